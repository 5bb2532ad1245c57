"""State by parameter, as ``torch.optim`` and ``torch.distributed.checkpoint`` know it, from state by owned channel.

For a parameter of E matrices (1, but for experts) with C channels each, ``step`` (steps taken, an int), and what the
rule declares (``rules.base.State``): state by channel as (E * C, width), the channels of all matrices one after the
other, and numbers of a matrix as () or for experts (E,). For another parameter ``step``, and the element rule's state
in the parameter's shape. Of a DTensor parameter these are DTensors: state by element is divided as the parameter is,
state by channel in even chunks (``Shard(0)``) over the mesh axes that shard the parameter, which any number of ranks
can read. Owners hold channels otherwise, so these are moved, in one all-to-all for each name and shard group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from ..distributed import meet, run_together
from ..exchange.collectives import device_for
from ..sharding.local_shard import Holding, view_of
from ..step.elementwise import ElementwiseTensor
from ..step.plan import StepPlan
from ..step.shard_group import ShardGroupStep
from .reshard import EvenReshard, LowRank

# Layouts in which ``param_groups`` holds the parameters themselves, whole or as DTensors.
LAYOUTS = ("whole", "dtensor")

State = dict[str, Any]


def by_parameter(build: StepPlan) -> bool:
    """Whether the parameters themselves are what the optimizer was given in this step, so that state can go by them."""
    return all(holding.layout in LAYOUTS for holding, _ in build.holdings)


def collect(build: StepPlan) -> dict[str, State]:
    """The state of every parameter, by name. A collective over each group of ranks that divide parameters.

    Tensors of plain parameters are the live ones, but for experts; DTensors are copies.
    """
    low, adam = _parameters(build)
    counts = _agreed(build, low, adam)
    found: dict[str, State] = {}
    for group_step, parameters in low:
        steps, numbers = counts[id(group_step.exchange.group.process_group)]
        for p in parameters:
            found[p.holding.name] = {"step": steps[p.holding.name]}
            for key in p.declared.matrix:
                values = [numbers[m.spec.name, key].to(p.holding.compute_dtype) for m in p.matrices]
                value = torch.stack(values).to(p.holding.device)
                found[p.holding.name][key] = value if len(value) > 1 else value[0]
        division = EvenReshard(group_step, parameters)
        for key in division.names:
            for p, mine in division.to_chunks(key):
                found[p.holding.name][key] = _like(p.mesh, mine, p.shape(key), p.placements)
    for tensor, holding, part in adam:
        steps, _ = counts[id(holding.group.process_group)]
        state: State = {"step": steps[holding.name]}
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for key in build.rules.element.state:
            flat = (
                torch.empty(0, dtype=holding.compute_dtype, device=holding.device) if part is None else part.state[key]
            )
            placements = tensor.placements if isinstance(tensor, DTensor) else ()
            state[key] = _like(getattr(tensor, "device_mesh", None), flat.view(local.shape), holding.shape, placements)
        found[holding.name] = state
    return found


def show(build: StepPlan) -> list[tuple[Tensor, State, State | None]]:
    """What this rank owns of the state of every parameter, live, under the keys of ``collect``.

    Of experts the values are lists, and the third entry is the state whose ``step`` is theirs.
    """
    low, adam = _parameters(build)
    found: list[tuple[Tensor, State, State | None]] = []
    for p in (p for _, parameters in low for p in parameters):
        first = p.matrices[0].state
        if len(p.matrices) == 1:
            found.append((p.tensor, first, None))
        else:
            stack = {key: [m.state[key] for m in p.matrices] for key in p.declared.names}
            found.append((p.tensor, {"step": first["step"], **stack}, first))
    for tensor, holding, part in adam:
        nothing = torch.empty(0, dtype=holding.compute_dtype, device=holding.device)
        found.append(
            (tensor, part.state if part else {"step": 0, **dict.fromkeys(build.rules.element.state, nothing)}, None)
        )
    return found


def restore(
    build: StepPlan, states: Mapping[str, Mapping[str, Any]], required: Set[str], group: dist.ProcessGroup | None
) -> None:
    """Take over what ``collect`` gave, also at another number of ranks. A collective, as it is.

    Args:
        build: whose state is replaced, in place.
        states: by name. Moments may be DTensors, or whole plain tensors.
        required: names of parameters that must have a state.
        group: the ranks that raise together.

    Raises:
        ValueError: on all ranks alike, if a state is missing or of another shape.
    """
    low, adam = _parameters(build)
    # Those on another mesh or with other placements become whole first: a collective, so before anything can fail.
    fitting: dict[str, Mapping[str, Any]] = {}
    for name, mesh, placements in [
        *((p.holding.name, p.mesh, p.placements) for _, parameters in low for p in parameters),
        *((h.name, getattr(t, "device_mesh", None), list(getattr(t, "placements", ()))) for t, h, _ in adam),
    ]:
        if name in states:
            fitting[name] = {key: _fitting(value, mesh, placements) for key, value in states[name].items()}

    divisions = [EvenReshard(group_step, parameters) for group_step, parameters in low]

    def local_part() -> list[dict[str, list[Tensor]]]:
        names = build.rules.element.state
        for _, holding, part in adam:
            _restore_elements(holding, part, _state_of(holding.name, fitting, required, names), names)
        for p in (p for _, parameters in low for p in parameters):
            _restore_numbers(p, _state_of(p.holding.name, fitting, required, p.declared.names))
        return [
            {key: [_chunk(p, fitting.get(p.holding.name), key) for p in division.having(key)] for key in division.names}
            for division in divisions
        ]

    for division, chunks in zip(divisions, run_together(local_part, group), strict=True):
        for key, values in chunks.items():
            division.to_owners(key, values)


def _parameters(
    build: StepPlan,
) -> tuple[list[tuple[ShardGroupStep, list[LowRank]]], list[tuple[Tensor, Holding, ElementwiseTensor | None]]]:
    """The low-rank parameters of each shard group, and the others with what this rank holds of them, all in order."""
    tensors = {id(h): t for t, (h, _) in zip(build.tensors, build.holdings, strict=True)}
    low: list[tuple[ShardGroupStep, list[LowRank]]] = []
    seen: set[int] = set()
    for group_step in build.shard_groups:
        parameters: list[LowRank] = []
        for number, matrix in enumerate(group_step.matrices):
            holding = matrix.holding
            if id(holding) not in seen:
                seen.add(id(holding))
                parameters.append(LowRank(tensors[id(holding)], holding, [], [], []))
            parameters[-1].numbers.append(number)
            parameters[-1].matrices.append(matrix)
        for p in parameters:
            p.divide()
        low.append((group_step, parameters))
    held = {id(a.holding): a for a in build.elementwise}
    adam = [(tensors[id(h)], h, held.get(id(h))) for h, _ in build.holdings if id(h) not in seen]
    return low, adam


def _agreed(
    build: StepPlan,
    low: list[tuple[ShardGroupStep, list[LowRank]]],
    adam: list[tuple[Tensor, Holding, ElementwiseTensor | None]],
) -> dict[int, tuple[dict[str, int], dict[tuple[str, str], Tensor]]]:
    """Steps by parameter, and numbers by matrix and name, for each process group, the same on all of its ranks.

    A rank that holds nothing of a parameter does not know them.
    """
    groups = {id(h.group.process_group): h.group for h, _ in build.holdings}
    found = {}
    for key, group in groups.items():
        steps = {p.holding.name: p.matrices[0].state["step"] for _, ps in low for p in ps if _is_in(p.holding, key)}
        steps |= {h.name: 0 if part is None else part.state["step"] for _, h, part in adam if _is_in(h, key)}
        norms: dict[tuple[str, str], Tensor] = {}
        for group_step, parameters in low:
            for p in (p for p in parameters if _is_in(p.holding, key)):
                for number, m in zip(p.numbers, p.matrices, strict=True):
                    taking_part = group.rank in group_step.plan.matrices[number].participants
                    for name in p.declared.matrix:
                        value = m.state[name]
                        norms[m.spec.name, name] = value if taking_part else torch.zeros_like(value)
        if group.process_group is not None:
            where = device_for(group.process_group, next(h.device for h, _ in build.holdings if _is_in(h, key)))
            numbers = [torch.tensor(list(steps.values()), dtype=torch.float64, device=where)]
            numbers += [norm.to(where, torch.float64).view(1) for norm in norms.values()]
            total = torch.cat(numbers)
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group.process_group)
            counted = total[: len(steps)].tolist()
            steps = {name: int(count) for name, count in zip(steps, counted, strict=True)}
            norms = dict(zip(norms, total[len(steps) :].unbind(), strict=True))
        found[key] = steps, norms
    return found


def _is_in(holding: Holding, key: int) -> bool:
    return id(holding.group.process_group) == key


def _like(mesh: DeviceMesh | None, local: Tensor, shape: Sequence[int], placements: Sequence[Placement]) -> Tensor:
    """A local tensor as a DTensor of that shape on a mesh; as it is where there is none."""
    if mesh is None:
        return local
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local.contiguous(), mesh, list(placements), run_check=False, shape=size, stride=stride)


def _fitting(value: Any, mesh: DeviceMesh | None, placements: Sequence[Placement]) -> Any:
    """A DTensor on this mesh with these placements as it is, any other one made whole."""
    if not isinstance(value, DTensor) or (value.device_mesh == mesh and list(value.placements) == list(placements)):
        return value
    meet()  # all ranks, before a collective that one of them might not come to
    return value.full_tensor()


def _state_of(
    name: str, states: Mapping[str, Mapping[str, Any]], required: Set[str], keys: Iterable[str]
) -> Mapping[str, Any] | None:
    """The loaded state of a parameter; None where there is none and need not be."""
    state = states.get(name)
    if state is None and name not in required:
        return None
    missing = [key for key in ("step", *keys) if key not in (state or {})]
    if missing:
        raise ValueError(
            f"the loaded state has no {', '.join(missing)} for {name}: it is of another model, of other groups, or of "
            "another optimizer"
        )
    return state


def _check_shape(name: str, key: str, value: Any, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the loaded state has {key} of shape {got} for {name}, and here it is {tuple(shape)}: the rank, the "
            "choice of low-rank matrices or the model differ"
        )


def _restore_elements(
    holding: Holding, part: ElementwiseTensor | None, state: Mapping[str, Any] | None, names: Iterable[str]
) -> None:
    for key in names:
        if state is None:
            return
        value = state[key]
        _check_shape(holding.name, key, value, holding.shape)
        if part is None:
            continue
        if isinstance(value, DTensor):
            part.state[key].copy_(value.to_local().reshape(-1))
            continue
        for box in holding.cover.boxes(holding.group.rank, holding.shape):
            window = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
            view_of(part.state[key], box.offset, box.sizes, box.strides).copy_(value[window])
    if part is not None and state is not None:
        part.state["step"] = int(state["step"])


def _restore_numbers(p: LowRank, state: Mapping[str, Any] | None) -> None:
    if state is None:
        return
    for matrix in p.matrices:
        matrix.state["step"] = int(state["step"])
    for key in p.declared.matrix:
        values = torch.as_tensor(state[key]).reshape(-1)
        _check_shape(p.holding.name, key, values, (len(p.matrices),))
        for matrix, value in zip(p.matrices, values.unbind(), strict=True):
            matrix.state[key].copy_(value)


def _chunk(p: LowRank, state: Mapping[str, Any] | None, key: str) -> Tensor:
    """This rank's chunk of a loaded moment, (channels, r); zeros where nothing was loaded."""
    start, stop = p.shares[p.holding.group.rank]
    if state is None:
        return torch.zeros((stop - start, p.shape(key)[1]), dtype=p.holding.compute_dtype, device=p.holding.device)
    value = state[key]
    _check_shape(p.holding.name, key, value, p.shape(key))
    local: Tensor = value.to_local() if isinstance(value, DTensor) else value[start:stop]
    if local.shape[0] != stop - start:
        raise ValueError(f"the loaded {key} of {p.holding.name} has {local.shape[0]} channels, expected {stop - start}")
    return local
