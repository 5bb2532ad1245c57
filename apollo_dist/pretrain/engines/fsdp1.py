"""FSDP1: ``FullyShardedDataParallel`` around every transformer block and the root."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from apollo_dist.pretrain.engines.native import NativeEngine
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.model import decoder_layers
from apollo_dist.pretrain.placing import fill_fsdp1, fsdp1_shards, materialize

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks

STRATEGIES = {
    "full": ShardingStrategy.FULL_SHARD,
    "grad_op": ShardingStrategy.SHARD_GRAD_OP,
    "hybrid": ShardingStrategy.HYBRID_SHARD,
    "none": ShardingStrategy.NO_SHARD,
}


class FSDP1(NativeEngine):
    """``precision: bf16`` computes in bf16, reduces gradients in fp32, and keeps the sharded weights in fp32."""

    def __init__(self, config: Config, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> None:
        low = config.precision == "bf16"
        initial = InitialWeights.of(config, model)
        self._fsdp = FullyShardedDataParallel(
            model,
            sharding_strategy=STRATEGIES[config.fsdp1_strategy],
            auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in decoder_layers(model)}),
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if low else None,
            device_id=ranks.device,
            param_init_fn=lambda module: _allocate(module, ranks.device),
            use_orig_params=True,
            **_hybrid_mesh(ranks) if config.fsdp1_strategy == "hybrid" else {},
        )
        held = ranks.gather({name: shard.numel() for name, shard in fsdp1_shards(self._fsdp).items()})
        first, count = _shard_group(config.fsdp1_strategy, ranks)
        ranks.together(lambda: fill_fsdp1(self._fsdp, initial, held[first : first + count], ranks.rank - first))
        super().__init__(config, plan, self._fsdp, ranks)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        return contextlib.nullcontext() if last else self._fsdp.no_sync()

    def clipped_norm(self) -> torch.Tensor:
        """See `NativeEngine`. Each rank holds parts of gradients, so the wrapper has to sum their squares."""
        # Without clipping too: a limit of infinity multiplies by exactly one.
        return self._fsdp.clip_grad_norm_(self._clip or float("inf"))


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Give the meta parameters of one module memory. FSDP1 flattens and shards it, and then each shard is filled."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        materialize(parameter, module, name, device, parameter.dtype)


def _shard_group(strategy: str, ranks: Ranks) -> tuple[int, int]:
    """(First rank, how many) of the ranks that divide a parameter with this one."""
    if strategy == "none":
        return ranks.rank, 1
    if strategy == "hybrid":
        local = _on_this_node(ranks)
        return ranks.rank - ranks.rank % local, local
    return 0, ranks.world


def _on_this_node(ranks: Ranks) -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if ranks.world % local:
        raise ValueError(f"--fsdp1_strategy hybrid needs nodes alike: {ranks.world} ranks in all, {local} on this node")
    return local


def _hybrid_mesh(ranks: Ranks) -> dict[str, Any]:
    """Shards within each node, replicas across nodes. By itself FSDP1 counts a node's GPUs, of which a CPU has none."""
    local = _on_this_node(ranks)
    shape = (ranks.world // local, local)
    return {"device_mesh": init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))}
