"""DTensor parameters: FSDP2 (``fully_shard``) on any dim, HSDP, tensor parallelism, and both together.

The mesh axes that shard a parameter make its shard group; axes that replicate it repeat the work. ``Shard(0)`` on one
axis cuts a row-major tensor into runs of whole rows, which is a flat cover; other placements give each rank a product
of index runs. Ranks beyond the last row hold nothing and still take part in everything.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from .grid import GridCover, Runs, chunk, strided_chunk
from .holding import WHOLE, Cover, Holding, ShardGroup, whole_cover
from .tiles import FlatCover, row_ranges


def read(name: str, parameter: DTensor) -> Holding:
    """The holding of a DTensor parameter.

    Where several mesh axes shard it, the process group over them is made, a collective, unless the mesh has it already.

    Raises:
        ValueError: for placements other than ``Shard``, ``_StridedShard`` and ``Replicate``, or if the local tensor is
            not the part that the placements say.
    """
    local = parameter.to_local()
    group, cover = _divide(name, parameter)
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


def _divide(name: str, parameter: DTensor) -> tuple[ShardGroup, Cover]:
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    # Exact types: a kind of Shard that is not known may mean another order of rows.
    unsupported = [p for p in placements if type(p) not in (Replicate, Shard, _StridedShard)]
    if unsupported:
        raise ValueError(
            f"{name}: placements {placements} are not supported; APOLLO reads Shard and Replicate on any mesh axes. "
            f"Redistribute the parameter so that it has no {type(unsupported[0]).__name__}"
        )
    axes = [axis for axis, p in enumerate(placements) if type(p) is not Replicate and mesh.size(axis) > 1]
    if not axes:
        return WHOLE, whole_cover(parameter.numel())
    group = ShardGroup.of(_group(name, mesh, axes))
    if len(axes) == 1 and type(placements[axes[0]]) is Shard and placements[axes[0]].dim % len(shape) == 0:  # type: ignore[attr-defined]
        return group, FlatCover(row_ranges(shape[0], parameter.numel() // max(shape[0], 1), group.size))
    assert group.process_group is not None
    stands = places(mesh)
    ranks = dist.get_process_group_ranks(group.process_group)
    return group, GridCover(tuple(_runs(parameter, stands[rank]) for rank in ranks))


def _group(name: str, mesh: DeviceMesh, axes: list[int]) -> dist.ProcessGroup:
    """The process group of the ranks that differ along ``axes`` only."""
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    if not mesh.mesh_dim_names:
        raise ValueError(
            f"{name} is sharded on {len(axes)} axes of a device mesh without names; pass mesh_dim_names to "
            "init_device_mesh"
        )
    names = tuple(mesh.mesh_dim_names[axis] for axis in axes)
    return mesh[names]._flatten().get_group()


def places(mesh: DeviceMesh) -> dict[int, tuple[int, ...]]:
    """Where each global rank stands in the mesh."""
    return dict(zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.mesh.shape)), strict=True))


def _runs(parameter: DTensor, place: tuple[int, ...]) -> tuple[Runs, ...]:
    """What the rank at ``place`` in the mesh holds: placements divide from left to right, as DTensor's do."""
    runs: list[Runs] = [((0, size),) if size else () for size in parameter.shape]
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        pieces, index = parameter.device_mesh.size(axis), place[axis]
        dim = placement.dim % parameter.ndim  # type: ignore[attr-defined]
        if type(placement) is _StridedShard:
            runs[dim] = strided_chunk(runs[dim], pieces, index, int(placement.split_factor))
        else:
            runs[dim] = chunk(runs[dim], pieces, index)
    return tuple(runs)


def _local(parameter: DTensor) -> Tensor:
    with torch.no_grad():
        return parameter.to_local()


def _local_grad(name: str, parameter: DTensor) -> Tensor | None:
    grad = parameter.grad
    if grad is None:
        return None
    if isinstance(grad, DTensor) and grad.placements != parameter.placements and _can_cut(grad, parameter):
        # Autograd under tensor parallelism may leave a gradient whole: this rank's part is cut out of it, once.
        grad = parameter.grad = grad.redistribute(placements=parameter.placements)
    if not isinstance(grad, DTensor) or tuple(grad.placements) != tuple(parameter.placements):
        got = grad.placements if isinstance(grad, DTensor) else "a plain tensor"
        raise ValueError(f"{name}: the gradient is {got}, the parameter {parameter.placements}; they must match")
    return grad.to_local()


def _can_cut(grad: DTensor, parameter: DTensor) -> bool:
    """Whether a gradient can get the parameter's placements without communication, in which not all ranks might join.

    A rank that holds nothing of a parameter does not look at its gradient.
    """
    pairs = zip(grad.placements, parameter.placements, strict=True)
    return grad.device_mesh == parameter.device_mesh and all(g == p or isinstance(g, Replicate) for g, p in pairs)


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
