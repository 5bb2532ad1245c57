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
from torch.overrides import TorchFunctionMode

from apollo_dist.pretrain.engines.native import NativeEngine
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.model import decoder_layers
from apollo_dist.pretrain.placing import fill_fsdp1, fsdp1_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        with _Unfilled(model, ranks.device) as unfilled:
            self._fsdp = FullyShardedDataParallel(
                model,
                sharding_strategy=STRATEGIES[config.fsdp1_strategy],
                auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in decoder_layers(model)}),
                mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if low else None,
                device_id=ranks.device,
                param_init_fn=unfilled.allocate,
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


class _Unfilled(TorchFunctionMode):
    """Parameters without values for FSDP1's constructor, which flattens those of a unit together before it shards them.

    All of them share the memory of one matrix, and flattening them copies none of it. So a rank touches the memory of
    its shard, and not that of a whole unit, of which the largest is the embedding and the head. The shards are filled
    afterwards.

    Args:
        model: on the meta device, its parameters of one dtype.
        device: for its parameters.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        largest = max(model.parameters(), key=torch.numel)
        self._shared = torch.empty(largest.numel(), dtype=largest.dtype, device=device)

    def allocate(self, module: nn.Module) -> None:
        """FSDP1's ``param_init_fn``: give the meta parameters that ``module`` itself has the shared memory."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = self._shared[: parameter.numel()].view(parameter.shape)
            setattr(module, name, nn.Parameter(memory, requires_grad=parameter.requires_grad))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchFunctionMode``."""
        if func is torch.cat and args and any(self._has(part) for part in args[0]):
            return self._flattened(args[0])
        return func(*args, **(kwargs or {}))

    def _flattened(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Memory for ``parts``, each 1-D, in a row. Only what pads parameters has values."""
        flat = torch.empty(sum(map(torch.numel, parts)), dtype=self._shared.dtype, device=self._shared.device)
        for place, part in zip(torch.split(flat, list(map(torch.numel, parts))), parts, strict=True):
            if not self._has(part):
                place.copy_(part)
        return flat

    def _has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._shared.untyped_storage().data_ptr()


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
