"""FSDP2: ``fully_shard`` on every transformer block and the root."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from apollo_dist.pretrain.engines.native import NativeEngine
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.model import decoder_layers
from apollo_dist.pretrain.placing import place_fsdp2

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks


class FSDP2(NativeEngine):
    """``precision: bf16`` computes in bf16, reduces gradients in fp32, and keeps the sharded weights in fp32."""

    def __init__(self, config: Config, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> None:
        super().__init__(config, plan, shard(config, model, ranks), ranks)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        cast(FSDPModule, self.module).set_requires_gradient_sync(last)
        return contextlib.nullcontext()


def shard(config: Config, model: nn.Module, ranks: Ranks) -> nn.Module:
    """``model``, sharded over all ranks, on their devices."""
    initial = InitialWeights.of(config, model)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    low = torch.bfloat16 if config.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return ranks.together(lambda: place_fsdp2(model, initial, ranks.device))  # one rank alone may lack memory
