"""DTensor parameters: FSDP2 (``fully_shard``) on any dim, HSDP, tensor parallelism, and both together.

The mesh axes that shard a parameter make its shard group; axes that replicate it repeat the work. ``Shard(0)`` on one
axis cuts a row-major tensor into runs of whole rows, which is a flat partition; other placements give each rank a
product of index runs. Ranks beyond the last row hold nothing and still take part in everything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.torch_version import TorchVersion

from ..distributed import gather_together, global_rank, world_of
from .grid import GridPartition, Runs, chunk, positions, strided_chunk
from .int8 import rows_of
from .internals import first_of, version_of
from .local_shard import WHOLE, LocalShard, Partition, ShardGroup
from .regions import FlatPartition, row_ranges, whole_partition

# From this version of torch on ``_StridedShard`` cuts uneven dims as ``grid.strided_chunk`` does (2.6 and 2.8 do not,
# 2.9 and 2.10 were not run).
UNEVEN_STRIDES = "2.11"

# The process groups that were made, with the default group of that time and their ranks.
_groups: list[tuple[object, tuple[int, ...], dist.ProcessGroup]] = []


def read(name: str, parameter: DTensor) -> LocalShard:
    """The shard of a DTensor parameter; local.

    Where several mesh axes shard it, ``make_groups`` has made the process group over them.

    Raises:
        ValueError: for placements other than ``Shard``, ``_StridedShard`` and ``Replicate``, or if the local tensor is
            not the part that the placements say.
    """
    local = parameter.to_local()
    group, partition = _divide(name, parameter)
    if local.numel() != partition.numel(group.rank):
        raise ValueError(
            f"{name}: rank {group.rank} of the shard group holds {local.numel()} elements, expected "
            f"{partition.numel(group.rank)} from {parameter.placements} of shape {tuple(parameter.shape)}"
        )
    return LocalShard(
        name=name,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        device=local.device,
        layout="dtensor",
        group=group,
        partition=partition,
        weight=lambda: _local(parameter),
        grad=lambda: _local_grad(name, parameter),
        rows=rows_of(name, parameter, _first_element(partition, group)),
    )


def _first_element(partition: Partition, group: ShardGroup) -> int:
    """The index of the first element that this rank holds of a parameter in one flat range; 0 for others."""
    return partition.ranges[group.rank][0] if isinstance(partition, FlatPartition) else 0


def _divide(name: str, parameter: DTensor) -> tuple[ShardGroup, Partition]:
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    # Exact types: a kind of Shard that is not known may mean another order of rows.
    unsupported = [p for p in placements if type(p) not in (Replicate, Shard, _StridedShard)]
    if unsupported:
        raise ValueError(
            f"{name}: placements {placements} are not supported; APOLLO reads Shard and Replicate on any mesh axes. "
            f"Redistribute the parameter so that it has no {type(unsupported[0]).__name__}"
        )
    process_group = shard_group(parameter)
    if process_group is None:
        return WHOLE, whole_partition(parameter.numel())
    group = ShardGroup.of(process_group)
    sharded = [placements[axis] for axis in _sharding_axes(parameter)]
    if len(sharded) == 1 and type(sharded[0]) is Shard and sharded[0].dim % len(shape) == 0:
        return group, FlatPartition(row_ranges(shape[0], parameter.numel() // max(shape[0], 1), group.size))
    coordinates = mesh_coordinates(mesh)
    ranks = dist.get_process_group_ranks(process_group)
    return group, GridPartition(tuple(_runs(parameter, coordinates[rank]) for rank in ranks))


def shard_group(parameter: DTensor) -> dist.ProcessGroup | None:
    """The process group over the mesh axes that shard a parameter; None where none does. Local.

    Raises:
        ValueError: where several axes shard it and ``make_groups`` did not make their group.
    """
    axes = _sharding_axes(parameter)
    if len(axes) < 2:
        return parameter.device_mesh.get_group(axes[0]) if axes else None
    ranks = _sharding_ranks(parameter)
    known = _known(ranks)
    if known is None:
        raise ValueError(
            f"there is no process group of ranks {ranks} yet, which share a parameter of shape "
            f"{tuple(parameter.shape)} over several mesh axes; call step() or prepare() on all ranks first"
        )
    return known


def make_groups(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Make the process groups that ``shard_group`` returns for DTensors that several mesh axes shard.

    A collective of ``group``. Every rank first says which groups it needs, so that none of them waits in the making of
    a group that another rank does not make. Groups are kept. Flattening the mesh would make one as well, but changes
    the mesh: once two axes have been flattened, torch 2.13 puts a DTensor that they divide unevenly along one dim
    together in a wrong order (``full_tensor``), whosever it is.

    Args:
        tensors: parameters of any kind.
        group: the ranks that train them, default all.

    Raises:
        ValueError: on all ranks alike, if the ranks of such a group do not all need it.
    """
    needed = gather_together(lambda: _needed(tensors), group)
    missing = sorted({ranks for of_rank in needed for ranks, exists in of_rank.items() if not exists})
    if not missing:
        return
    number = {global_rank(i, group): i for i in range(world_of(group))}
    for ranks in missing:
        absent = [rank for rank in ranks if rank not in number or ranks not in needed[number[rank]]]
        if absent:
            raise ValueError(
                f"some ranks hold parameters that are sharded over ranks {ranks}, but rank {absent[0]} of these "
                f"{'is not in process_group' if absent[0] not in number else 'holds none of them'}: build the same "
                "model on the same mesh on all of these ranks"
            )
    mine = dist.get_rank()
    for ranks in missing:  # in the same order on every rank
        if mine in ranks:
            made = dist.new_group(list(ranks), use_local_synchronization=True)
            world = dist.group.WORLD
            kept = [known for known in _groups if known[0] is world and known[1] != ranks]
            _groups[:] = [*kept, (world, ranks, made)]


def _needed(tensors: Iterable[Tensor]) -> dict[tuple[int, ...], bool]:
    """The ranks of each group that this rank needs, and whether the group exists."""
    doubly = [t for t in tensors if is_dtensor(t) and len(_sharding_axes(t)) > 1]  # type: ignore[arg-type]
    found = {_sharding_ranks(t) for t in doubly}  # type: ignore[arg-type]
    return {ranks: _known(ranks) is not None for ranks in found}


def _known(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    world = dist.group.WORLD
    return next((made for default, of, made in _groups if default is world and of == ranks), None)


def _sharding_ranks(parameter: DTensor) -> tuple[int, ...]:
    """The global ranks along the mesh axes that divide a parameter, in the order of the mesh."""
    mesh, axes = parameter.device_mesh, _sharding_axes(parameter)
    mine = mesh.get_coordinate()
    if mine is None:
        raise ValueError(f"this rank is not in the mesh {mesh} of a parameter of shape {tuple(parameter.shape)}")
    chosen = tuple(slice(None) if i in axes else at for i, at in enumerate(mine))
    return tuple(mesh.mesh[chosen].flatten().tolist())


def shard_mesh(parameter: DTensor) -> DeviceMesh:
    """The parameter's mesh; where several axes shard it, a mesh of one axis over its shard group.

    Local: torch makes a mesh of a group that exists without communication.
    """
    mesh = parameter.device_mesh
    if len(_sharding_axes(parameter)) < 2:
        return mesh
    group = shard_group(parameter)
    assert group is not None
    return DeviceMesh.from_group(group, mesh.device_type)


def _sharding_axes(parameter: DTensor) -> list[int]:
    """The mesh axes that divide a parameter."""
    mesh = parameter.device_mesh
    return [axis for axis, p in enumerate(parameter.placements) if type(p) is not Replicate and mesh.size(axis) > 1]


def mesh_coordinates(mesh: DeviceMesh) -> dict[int, tuple[int, ...]]:
    """Where each global rank stands in the mesh."""
    return dict(zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.mesh.shape)), strict=True))


def _runs(tensor: DTensor, place: tuple[int, ...]) -> tuple[Runs, ...]:
    """What the rank at ``place`` in the mesh holds: placements divide from left to right, as DTensor's do."""
    runs: list[Runs] = [((0, size),) if size else () for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        pieces, index = tensor.device_mesh.size(axis), place[axis]
        dim = placement.dim % tensor.ndim  # type: ignore[attr-defined]
        if type(placement) is _StridedShard:
            _check_strided(tensor, axis, dim)
            runs[dim] = strided_chunk(runs[dim], pieces, index, int(placement.split_factor))
        else:
            runs[dim] = chunk(runs[dim], pieces, index)
    return tuple(runs)


def _check_strided(tensor: DTensor, axis: int, dim: int) -> None:
    """Raise ValueError where an older torch cuts a dim that several mesh axes divide unevenly in another way."""
    pieces = tensor.device_mesh.size(axis) * int(tensor.placements[axis].split_factor)  # type: ignore[attr-defined]
    if TorchVersion(torch.__version__) < UNEVEN_STRIDES and tensor.shape[dim] % pieces:
        raise ValueError(
            f"torch {version_of('torch')} divides dim {dim} of shape {tuple(tensor.shape)} unevenly into {pieces} "
            f"pieces over several mesh axes, in an order that APOLLO does not read: install torch {UNEVEN_STRIDES} or "
            "later, or choose sizes that these axes divide evenly"
        )


def _local(parameter: DTensor) -> Tensor:
    with torch.no_grad():
        return parameter.to_local()


def _local_grad(name: str, parameter: DTensor) -> Tensor | None:
    grad = parameter.grad
    if grad is None or not parameter.requires_grad:
        return None
    if isinstance(grad, DTensor) and grad.placements != parameter.placements and _can_cut(grad, parameter):
        # Autograd under tensor parallelism may leave a gradient whole: this rank's part is cut out of it, once.
        grad = parameter.grad = _cut(grad, parameter)
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


def _cut(grad: DTensor, parameter: DTensor) -> DTensor:
    """A gradient with the parameter's placements, of which this rank holds all elements that it needs; local.

    Not ``redistribute``: where several axes divide one dim, that may communicate to get from one order to another.
    """
    place = parameter.device_mesh.get_coordinate()
    assert place is not None
    local = grad.to_local()
    held, wanted = _runs(grad, tuple(place)), _runs(parameter, tuple(place))
    for dim, (have, want) in enumerate(zip(held, wanted, strict=True)):
        if have != want:
            at = [range(start, stop) for start, stop in positions(have, want)]
            index = torch.tensor([i for run in at for i in run], dtype=torch.int64, device=local.device)
            local = local.index_select(dim, index)
    return DTensor.from_local(
        local.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def reshard(module: nn.Module) -> None:
    """Make the parameters of FSDP2 modules the sharded ones.

    After a forward pass without a backward one (an evaluation) a module may show unsharded copies in their place, which
    the next forward pass would use however the sharded ones have changed.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for inner in module.modules() if fsdp is not None else ():
        if isinstance(inner, fsdp.FSDPModule):
            inner.reshard()


def sharded_modules() -> list[nn.Module]:
    """The modules of this process that ``fully_shard`` was applied to.

    Raises:
        UnknownInternals: if torch does not say.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    from torch.distributed import _composable_state as composable  # fully_shard's own record of its modules

    modules = list(first_of(composable, "_module_state_mapping"))
    return [module for module in modules if isinstance(module, fsdp.FSDPModule)]


def is_dtensor(parameter: Tensor) -> bool:
    """Whether ``parameter`` is a DTensor; False where torch was built without torch.distributed."""
    return dist.is_available() and isinstance(parameter, DTensor)
