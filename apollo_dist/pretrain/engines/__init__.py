"""DeepSpeed, FSDP and DDP behind one protocol."""

from apollo_dist.pretrain.engines.base import Engine, build_engine

__all__ = ["Engine", "build_engine"]
