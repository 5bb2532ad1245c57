"""State by parameter, as ``torch.optim`` and ``torch.distributed.checkpoint`` know it, from slots by matrix.

For a parameter of E matrices (1, but for experts) with C channels each, ``step`` (steps taken, a float32 tensor () on
the CPU, as torch's optimizers have it), and what the rule declares (``rules.base.State``): state by channel as
(E * C, width), the channels of all matrices one after the other, numbers of a matrix as () or for experts (E,), a
stored projection as (inner, r) or (E, inner, r), and state by element in the parameter's shape. For another parameter
``step``, and the element rule's state in the parameter's shape. Of a DTensor parameter these are DTensors: state by
element is divided as the parameter is, state by channel as its owners have it (``OwnedTensor``). Everything is what
this rank has anyway, so nothing is communicated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from ..distributed import meet, run_together
from ..sharding.local_shard import PARAMETER_LAYOUTS, LocalShard, view_of
from .owned_tensor import OwnedTensor, Rows, as_dtensor
from .reshard import LowRank
from .slots import STEP, Slot, step_tensor

if TYPE_CHECKING:
    from ..step.elementwise import ElementwiseTensor
    from ..step.plan import StepPlan

State = dict[str, Any]


def by_parameter(build: StepPlan) -> bool:
    """Whether the parameters themselves are what the optimizer was given in this step, so that state can go by them."""
    return all(shard.layout in PARAMETER_LAYOUTS for shard, _ in build.shards)


def collect(build: StepPlan) -> dict[str, State]:
    """The state of every parameter, by name; local.

    Tensors are the live ones, but for those of experts, which are copies.
    """
    low, adam = _parameters(build)
    found: dict[str, State] = {}
    for p in low:
        state = found[p.shard.name] = {STEP: step_tensor(p.matrices[0].state[STEP])}
        for key in p.by_matrix:
            state[key] = _by_matrix(p, key)
        for key in p.declared.channel:
            parts = [m.state[key] for m in p.matrices]
            state[key] = _by_channel(p, key, parts[0] if len(parts) == 1 else torch.cat(parts))
        for key in p.declared.element:
            parts = [m.state[key] for m in p.matrices]
            state[key] = _like_parameter(p.tensor, parts[0] if len(parts) == 1 else torch.cat(parts), p.shard.shape)
    for tensor, part in adam:
        found[part.shard.name] = _by_element(tensor, part)
    return found


def template(build: StepPlan) -> dict[str, State]:
    """A new state of every parameter, by name, in the even chunks that torch divides a whole tensor into.

    ``set_optimizer_state_dict`` asks for the state only to write whole tensors that it has into this rank's part.
    """
    low, adam = _parameters(build)
    found: dict[str, State] = {}
    for p in low:
        count = len(p.matrices)
        factory_kwargs: dict[str, Any] = {"dtype": p.shard.compute_dtype, "device": p.shard.device}
        start, stop = p.chunks[p.shard.group.rank]
        state = found[p.shard.name] = {STEP: step_tensor(0)}
        for key, shape in p.by_matrix.items():
            state[key] = torch.zeros((count, *shape) if count > 1 else shape, **factory_kwargs)
        for key, width in p.declared.channel.items():
            state[key] = _like(p.mesh, torch.zeros((stop - start, width), **factory_kwargs), p.shape(key), p.placements)
        for key in p.declared.element:
            state[key] = _like_parameter(p.tensor, torch.zeros(p.shard.numel, **factory_kwargs), p.shard.shape)
    for tensor, part in adam:
        fresh = {key: torch.zeros_like(value) for key, value in _by_element(tensor, part).items()}
        found[part.shard.name] = fresh
    return found


def show(build: StepPlan) -> list[tuple[Tensor, State, Slot]]:
    """The state of every parameter, live, and the slot that counts its steps.

    As ``collect`` gives it, but for experts, of which the values are lists by matrix of what this rank has.
    """
    low, adam = _parameters(build)
    found: list[tuple[Tensor, State, Slot]] = []
    for p in low:
        slots = [m.state for m in p.matrices]
        state: State = {STEP: step_tensor(slots[0][STEP])}
        if len(slots) == 1:
            state |= {key: _by_matrix(p, key) for key in p.by_matrix}
            state |= {key: _by_channel(p, key, slots[0][key]) for key in p.declared.channel}
            state |= {key: _like_parameter(p.tensor, slots[0][key], p.shard.shape) for key in p.declared.element}
        else:
            names = dict.fromkeys((*p.declared.names, *p.by_matrix))
            state |= {key: [slot[key] for slot in slots] for key in names}
        found.append((p.tensor, state, slots[0]))
    found += [(tensor, _by_element(tensor, part), part.state) for tensor, part in adam]
    return found


def restore(build: StepPlan, states: Mapping[str, Mapping[str, Any]], group: dist.ProcessGroup | None) -> None:
    """Take over what ``collect`` gave, also at another number of ranks; parameters without a state start anew.

    A collective, since tensors that other ranks divided otherwise are made whole.

    Args:
        build: whose state is replaced, in place.
        states: by name. Moments may be DTensors of any kind, or whole plain tensors.
        group: the ranks that raise together.

    Raises:
        ValueError: on all ranks alike, if a state is of another shape.
    """
    low, adam = _parameters(build)
    # What lies otherwise here becomes whole first: a collective, so before anything can fail.
    fitting: dict[str, State] = {}
    for p in (p for p in low if p.shard.name in states):
        rows = {key: p.rows_by_matrix(shape) for key, shape in p.by_matrix.items()}
        rows |= dict.fromkeys(p.declared.channel, p.rows)
        fitting[p.shard.name] = {
            key: _fitting(value, *_layout(p.tensor))
            if key in p.declared.element
            else _fitting(value, p.mesh, p.placements, rows.get(key), p.even)
            for key, value in states[p.shard.name].items()
        }
    for tensor, part in adam:
        if part.shard.name in states:
            given = states[part.shard.name]
            fitting[part.shard.name] = {key: _fitting(value, *_layout(tensor)) for key, value in given.items()}

    def local_part() -> None:
        for p in (p for p in low if p.shard.name in fitting):
            _restore_low_rank(p, fitting[p.shard.name])
        for _, part in adam:
            if part.shard.name in fitting:
                _restore_elements(part, fitting[part.shard.name])

    run_together(local_part, group)


def _parameters(build: StepPlan) -> tuple[list[LowRank], list[tuple[Tensor, ElementwiseTensor]]]:
    """The low-rank parameters and the others, in order, each with its tensor in ``param_groups``."""
    tensors = {id(h): t for t, (h, _) in zip(build.tensors, build.shards, strict=True)}
    low: dict[int, LowRank] = {}
    for group_step in build.shard_groups:
        for plan, matrix in zip(group_step.plan.matrices, group_step.matrices, strict=True):
            key = id(matrix.shard)
            p = low.setdefault(key, LowRank(tensors[key], matrix.shard, [], []))
            p.plans.append(plan)
            p.matrices.append(matrix)
    return list(low.values()), [(tensors[id(a.shard)], a) for a in build.elementwise]


def _by_channel(p: LowRank, key: str, local: Tensor) -> Tensor:
    """What this rank owns of a state, (its channels, width), as a tensor of all channels."""
    if p.mesh is None or p.shard.group.process_group is None or p.even:
        return _like(p.mesh, local, p.shape(key), p.placements)
    return OwnedTensor.of(local, p.shape(key), p.mesh, p.placements, p.rows)


def _by_matrix(p: LowRank, key: str) -> Tensor:
    """What ranks have of each matrix; what a rank without elements of a matrix has is not that matrix's."""
    values, shape = [m.state[key] for m in p.matrices], p.by_matrix[key]
    everywhere = all(len(ranges) == len(values) for ranges in p.participants)
    if everywhere or p.mesh is None or p.shard.group.process_group is None:
        return values[0] if len(values) == 1 else torch.stack(values)
    rows = p.rows_by_matrix(shape)
    if len(values) == 1:
        return OwnedTensor.of(values[0], shape, p.mesh, p.placements, rows)
    mine = [values[e] for e, _ in p.participants[p.shard.group.rank]]
    local = torch.stack(mine) if mine else values[0].new_empty((0, *shape))
    return OwnedTensor.of(local, (len(values), *shape), p.mesh, p.placements, rows)


def _by_element(tensor: Tensor, part: ElementwiseTensor) -> State:
    found: State = {STEP: step_tensor(part.state[STEP])}
    for key in part.names:
        found[key] = _like_parameter(tensor, part.state[key], part.shard.shape)
    return found


def _layout(tensor: Tensor) -> tuple[DeviceMesh | None, list[Placement]]:
    """Mesh and placements of a DTensor; none of other tensors."""
    return getattr(tensor, "device_mesh", None), list(getattr(tensor, "placements", ()))


def _like_parameter(tensor: Tensor, flat: Tensor, shape: Sequence[int]) -> Tensor:
    """The local elements of a state of a parameter as a tensor that is divided as the parameter is."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    mesh, placements = _layout(tensor)
    return _like(mesh, flat.view(local.shape), shape, placements)


def _like(mesh: DeviceMesh | None, local: Tensor, shape: Sequence[int], placements: Sequence[Placement]) -> Tensor:
    """A local tensor as a DTensor of that shape on a mesh; as it is where there is none."""
    if mesh is None:
        return local
    return as_dtensor(local.contiguous(), shape, mesh, placements)


def _fitting(
    value: Any, mesh: DeviceMesh | None, placements: Sequence[Placement], rows: Rows | None = None, even: bool = True
) -> Any:
    """A loaded tensor as it is if this rank's part of it is the part that it needs; a whole tensor otherwise.

    Args:
        value: anything.
        mesh, placements: of this rank's part.
        rows: of each rank, where owners divide the tensor.
        even: whether those are the even chunks that ``placements`` mean.
    """
    if isinstance(value, OwnedTensor):
        fits = value.device_mesh == mesh and value.rows == rows
    elif isinstance(value, DTensor):
        fits = even and value.device_mesh == mesh and list(value.placements) == list(placements)
    else:
        return value
    if fits:
        return value
    meet()  # all ranks, before a collective that one of them might not come to
    return value.full_tensor()


def _check_shape(name: str, key: str, value: Any, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the loaded state has {key} of shape {got} for {name}, and here it is {tuple(shape)}: the rank, the "
            "choice of low-rank matrices or the model differ"
        )


def _restore_elements(part: ElementwiseTensor, state: Mapping[str, Any]) -> None:
    for key in part.names:
        _take_local(part.shard, key, state[key], part.state[key])
    part.state[STEP] = int(state[STEP])


def _take_local(shard: LocalShard, key: str, value: Any, flat: Tensor) -> None:
    """Write this rank's elements of a state of a parameter to ``flat``, in the order of the local weights."""
    _check_shape(shard.name, key, value, shard.shape)
    if isinstance(value, DTensor):
        flat.copy_(value.to_local().reshape(-1))
        return
    for box in shard.partition.boxes(shard.group.rank, shard.shape):
        window = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
        view_of(flat, box.offset, box.sizes, box.strides).copy_(value[window])


def _restore_low_rank(p: LowRank, state: Mapping[str, Any]) -> None:
    name, count = p.shard.name, len(p.matrices)
    for matrix in p.matrices:
        matrix.state[STEP] = int(state[STEP])
    for key, shape in p.by_matrix.items():
        values = state[key] if isinstance(state[key], Tensor) else torch.as_tensor(state[key])
        if values.numel() != count * math.prod(shape):
            _check_shape(name, key, values, (count, *shape))
        mine = [e for e, _ in p.participants[p.shard.group.rank]]
        if isinstance(values, OwnedTensor):
            known = dict(zip(mine, values.to_local().reshape(-1, *shape).unbind(), strict=False))
        else:
            known = dict(enumerate(values.reshape(count, *shape).unbind()))
        for e, value in known.items():
            if not shape or e in mine:
                p.matrices[e].state[key].copy_(value)
    for key in p.declared.element:
        parts = [matrix.state[key] for matrix in p.matrices]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        _take_local(p.shard, key, state[key], flat)
        for part, values in zip(parts, torch.split(flat, [len(part) for part in parts]), strict=True):
            part.copy_(values)
    for key in p.declared.channel:
        value = state[key]
        _check_shape(name, key, value, p.shape(key))
        if isinstance(value, DTensor):
            rows = value.to_local()
        else:
            parts = [value[start:stop] for start, stop in p.rows[p.shard.group.rank]]
            rows = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else value[:0]
        at = 0
        for matrix in p.matrices:
            slot = matrix.state[key]
            slot.copy_(rows[at : at + len(slot)])
            at += len(slot)
