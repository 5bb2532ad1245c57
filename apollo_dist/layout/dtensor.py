"""DTensor parameters: FSDP2 (``fully_shard``) on dim 0, and HSDP.

``Shard(0)`` cuts a row-major tensor into runs of whole rows, so it is a flat cover like the others. Ranks beyond the
last row hold nothing and still take part in everything.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from .holding import WHOLE, Holding, ShardGroup, whole_cover
from .tiles import FlatCover, Range, row_ranges


def read(name: str, parameter: DTensor) -> Holding:
    """The holding of a DTensor parameter.

    Raises:
        ValueError: for placements other than ``Shard(0)`` on one axis and ``Replicate`` on the rest, or if the local
            tensor is not the chunk that those placements say.
    """
    local = parameter.to_local()
    group, ranges = _divide(name, parameter)
    cover = FlatCover(ranges) if group.size > 1 else whole_cover(parameter.numel())
    if local.numel() != cover.numel(group.rank):
        raise ValueError(
            f"{name}: rank {group.rank} of the shard group holds {local.numel()} elements, expected "
            f"{cover.numel(group.rank)} from {parameter.placements} of shape {tuple(parameter.shape)}"
        )
    return Holding(
        name=name,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        device=local.device,
        layout="dtensor",
        group=group,
        cover=cover,
        weight=lambda: _local(parameter),
        grad=lambda: _local_grad(name, parameter),
    )


def _divide(name: str, parameter: DTensor) -> tuple[ShardGroup, tuple[Range, ...]]:
    mesh, shape = parameter.device_mesh, parameter.shape
    # Exact types: _StridedShard is a Shard, and means another order of rows.
    unsupported = [p for p in parameter.placements if type(p) not in (Replicate, Shard)]
    sharded = [axis for axis, p in enumerate(parameter.placements) if type(p) is Shard and mesh.size(axis) > 1]
    if unsupported or len(sharded) > 1 or any(_dim(parameter, axis) != 0 for axis in sharded):
        raise ValueError(
            f"{name}: placements {parameter.placements} are not supported yet. This version reads Shard(0) on one mesh "
            "axis with Replicate on the others (FSDP2 and HSDP); tensor parallelism and dim-1 sharding come later"
        )
    if not sharded:
        return WHOLE, ()
    group = ShardGroup.of(mesh.get_group(sharded[0]))
    return group, row_ranges(shape[0], parameter.numel() // max(shape[0], 1), group.size)


def _dim(parameter: DTensor, axis: int) -> int:
    placement = parameter.placements[axis]
    assert isinstance(placement, Shard)
    return placement.dim % parameter.ndim


def _local(parameter: DTensor) -> Tensor:
    with torch.no_grad():
        return parameter.to_local()


def _local_grad(name: str, parameter: DTensor) -> Tensor | None:
    grad = parameter.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor) or tuple(grad.placements) != tuple(parameter.placements):
        got = grad.placements if isinstance(grad, DTensor) else "a plain tensor"
        raise ValueError(f"{name}: the gradient is {got}, the parameter {parameter.placements}; they must match")
    return grad.to_local()


def reshard(module: nn.Module) -> None:
    """Make the parameters of FSDP2 modules the sharded ones.

    After a forward pass without a backward one (an evaluation) a module may show unsharded copies in their place, which
    the next forward pass would use however the sharded ones have changed.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for inner in module.modules() if fsdp is not None else ():
        if isinstance(inner, fsdp.FSDPModule):
            inner.reshard()


def any_sharded_module() -> bool:
    """Whether this process has a module that ``fully_shard`` was applied to; False if torch does not say."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    composable: Any = sys.modules.get("torch.distributed._composable_state")
    modules = list(getattr(composable, "_module_state_mapping", ()))
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules)


def is_dtensor(parameter: Tensor) -> bool:
    """Whether ``parameter`` is a DTensor; False where torch was built without torch.distributed."""
    return dist.is_available() and isinstance(parameter, DTensor)
