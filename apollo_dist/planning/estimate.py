"""Memory and traffic of a run, from the plan that the run would make. Integers only: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..exchange.plan import MatrixSpec, Plan, make_plan
from ..exchange.whole import BFLOAT16, traffic
from ..optimizers.options import check_known
from ..rules.base import ElementRule, MatrixRule, Rules, Spec
from ..rules.registry import rules_named
from ..rules.roles import ROLE, Role
from ..selection import choice
from ..selection.choice import check_any, low_rank_names
from ..selection.roles import of_names
from ..sharding.local_shard import Partition, matrices
from ..sharding.names import matrix_name
from ..sharding.regions import FlatPartition, Range, Tile, cut_ranges, even_ranges, row_ranges
from ..step.specs import check_matrix, exchanged

LAYOUTS = ("whole", "fsdp1", "fsdp2", "zero", "zero3")
NUMBER = 4  # bytes: states and exchanges are fp32
# FSDP1 lets every parameter begin at a multiple of so many bytes, counted in the dtype it computes in.
_FSDP1_ALIGNMENT = 16

Shapes = Mapping[str, Sequence[int]]
RULES = rules_named("apollo")


@dataclass(frozen=True)
class Estimate:
    """What each rank of a shard group keeps and sends.

    Attributes:
        state_bytes: of optimizer state on each rank, as ``APOLLO.state_bytes()`` reports after the first step.
        exchange_bytes: that leave each rank in one step.
        collectives: in one step; the same on every rank.
        refresh_bytes: that leave each rank when projections are made anew from whole gradients, all of them at once.
        buffer_bytes: on each rank during exchange 1, which needs more than exchange 2: the partial low-rank
            gradients, what is sent and what arrives, each taken to be as large as what leaves the rank; where that
            takes several buckets, those of two.
    """

    state_bytes: tuple[int, ...]
    exchange_bytes: tuple[int, ...]
    collectives: int
    buffer_bytes: tuple[int, ...] = ()
    refresh_bytes: tuple[int, ...] = ()


def estimate(
    shapes: Shapes,
    rank: int,
    *,
    scale_type: str = "channel",
    world: int = 1,
    layout: str = "zero3",
    low_rank: Collection[str] | None = None,
    disable_nl: bool = False,
    sub_group_size: int = 1_000_000_000,
    compute_bytes: int = 4,
    rules: Rules = RULES,
    adam_dtype: Any = None,
) -> Estimate:
    """Predict memory and traffic for a model's trainable parameters.

    Args:
        shapes: canonical name -> logical shape, in the model's order.
        rank: r of the low-rank matrices.
        scale_type, disable_nl: as in ``APOLLO``.
        world: ranks of the shard group.
        layout: "whole" (one process, DDP, ZeRO-0), "fsdp1" (every numbered block wrapped, and the root), "fsdp2"
            (rows; the wrapping makes no difference), "zero" (ZeRO-1 and 2) or "zero3".
        low_rank: names of the low-rank parameters; by default chosen by name and shape, as no model is known.
        sub_group_size: DeepSpeed's option of that name, for "zero3".
        compute_bytes: size of an element that FSDP1 computes in, by which it aligns parameters.
        rules: of the optimizer; by default APOLLO's.
        adam_dtype: as in ``APOLLO``.

    Raises:
        ValueError: for an unknown layout, or a parameter that cannot be low-rank.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    chosen = set(low_rank_of(shapes, rank) if low_rank is None else low_rank)
    matrix = rules.matrix
    assert matrix is not None
    options = {key: option.default for key, option in matrix.options.items()}
    options |= {"rank": rank, "scale_type": scale_type, "disable_nl": disable_nl}
    ranks = 1 if layout == "whole" else world
    low = {name: tuple(shape) for name, shape in shapes.items() if name in chosen}
    partitions = divide(shapes, chosen, layout, ranks, compute_bytes)
    for name, shape in low.items():
        check_matrix(name, shape, rank)
    calls = _sub_groups(low, sub_group_size, ranks) if layout == "zero3" else [low]
    plans = [make_plan(_specs(part, partitions, lambda _, m, n: matrix.spec(m, n, options)), ranks) for part in calls]
    rest = [partition for name, partition in partitions.items() if name not in chosen]
    result = estimate_plans(plans, rest, ranks, rules.element, {"adam_dtype": adam_dtype})
    return _repeated(result, world // ranks)


def estimate_rule(
    shapes: Shapes,
    rule: str,
    *,
    world: int = 1,
    layout: str = "zero3",
    roles: Mapping[str, Role] | None = None,
    sub_group_size: int = 1_000_000_000,
    compute_bytes: int = 4,
    low_rank: Collection[str] | None = None,
    **options: Any,
) -> Estimate:
    """The same for an optimizer of any rule; without low-rank matrices all parameters are in one group.

    Args:
        shapes: canonical name -> logical shape, in the model's order.
        rule: the rule's name, such as "scale".
        world, layout, sub_group_size, compute_bytes: as of ``estimate``.
        roles: what each parameter is in its model (``selection.roles.of_model``); by default by its name.
        low_rank: as of ``estimate``, for rules with a rank.
        options: of the rule.

    Raises:
        ValueError: for an unknown layout, rule or option, or a parameter that cannot be low-rank.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    rules = rules_named(rule)
    check_known(options, rules.options, "option")
    given = {name: tuple(shape) for name, shape in shapes.items()}
    known = of_names(given) if roles is None else roles
    group = {"weight_decay": 0.0, **{key: option.default for key, option in rules.options.items()}, **options}
    chosen: set[str] = set()
    if rules.matrix is not None and rules.matrix.chosen:
        chosen = set(low_rank_of(given, group["rank"]) if low_rank is None else low_rank)
        for name in chosen:
            check_matrix(name, given[name], group["rank"])
    full = {name: {"rank": None} for name in given if chosen and name not in chosen}
    views = {name: {**group, **full.get(name, {}), ROLE: known[name]} for name in given}
    by_rule = {name: rules.rule_of(shape, views[name]) for name, shape in given.items()}
    ranks = 1 if layout == "whole" else world
    partitions = divide(given, chosen, layout, ranks, compute_bytes)

    def declared(name: str, m: int, n: int) -> Spec:
        matrix = by_rule[name]
        assert isinstance(matrix, MatrixRule)
        return matrix.spec(m, n, views[name])

    # Low-rank matrices are a parameter group of their own, and sub-groups are those of a group.
    stepped = {name: shape for name, shape in given.items() if not chosen or name in chosen}
    calls = _sub_groups(stepped, sub_group_size, ranks) if layout == "zero3" else [stepped]
    of_matrices = [{n: s for n, s in part.items() if isinstance(by_rule[n], MatrixRule)} for part in calls]
    plans = [make_plan(_specs(part, partitions, declared), ranks) for part in of_matrices if part]
    rest = [partition for name, partition in partitions.items() if not isinstance(by_rule[name], MatrixRule)]
    return _repeated(estimate_plans(plans, rest, ranks, rules.element, group), world // ranks)


def low_rank_of(shapes: Shapes, rank: int) -> Collection[str]:
    """Names of the parameters that are low-rank where no model is known; ValueError if there are none."""
    found = choice.of_names({name: tuple(shape) for name, shape in shapes.items()}, rank)
    check_any(found, f"{len(shapes)} parameters", rank)
    return low_rank_names(found)


def _repeated(result: Estimate, replicas: int) -> Estimate:
    return Estimate(
        result.state_bytes * replicas,
        result.exchange_bytes * replicas,
        result.collectives,
        result.buffer_bytes * replicas,
        result.refresh_bytes * replicas,
    )


def state_bytes(shapes: Shapes, rank: int, scale_type: str, world: int, layout: str) -> tuple[int, ...]:
    """Bytes of optimizer state on each rank; see ``estimate``."""
    return estimate(shapes, rank, scale_type=scale_type, world=world, layout=layout).state_bytes


def estimate_plans(
    plans: Iterable[Plan],
    rest: Iterable[Partition],
    ranks: int,
    element: ElementRule = RULES.element,
    group: Mapping[str, Any] | None = None,
) -> Estimate:
    """What the matrices of some plans, and the other parameters, cost each rank of a shard group.

    Args:
        plans: of the low-rank matrices, one for each call of ``step()``.
        rest: partitions of the other parameters.
        ranks: of the shard group.
        element: the rule of the other parameters.
        group: their options; the rule's defaults where it has none.
    """
    state, sent, buffers, refresh, collectives = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks, 0
    known = {**{key: option.default for key, option in element.options.items()}, **(group or {})}
    dtype = element.state_dtype(known)
    width = len(element.state_of(known)) * (NUMBER if dtype is None else dtype.itemsize)
    for partition in rest:
        for k in range(ranks):
            state[k] += width * partition.numel(k)
    for plan in plans:
        whole = traffic(plan, NUMBER)
        collectives += plan.needs_exchange1 * plan.buckets + plan.needs_exchange2 + whole.collectives
        collectives += bool(plan.first_term_places)
        for k in range(ranks):
            first, second = plan.numbers_sent(k)
            kept = plan.owned_numbers(k) + sum(m.spec.matrix_state for m in plan.matrices)
            by_element = (m for m in plan.matrices if m.spec.element_state)
            kept += sum(m.spec.element_state * int(m.partition.elements(ranks)[k]) for m in by_element)
            state[k] += NUMBER * kept + sum(_shared_bytes(m.spec) for m in plan.matrices if k in m.participants)
            sent[k] += NUMBER * (first + second) + int(whole.sent[k])
            refresh[k] += int(whole.refresh_sent[k])
            # Of whole matrices an owner has what arrives, the matrices, and what it makes of them.
            under_way = 3 * first * min(2, plan.buckets) // plan.buckets
            buffers[k] = max(buffers[k], NUMBER * max(under_way, 2 * second), 3 * int(whole.largest[k]))
    return Estimate(tuple(state), tuple(sent), collectives, tuple(buffers), tuple(refresh))


def _shared_bytes(spec: MatrixSpec) -> int:
    return spec.shared_state * (BFLOAT16 if spec.shared_in_bfloat16 else NUMBER)


def divide(
    shapes: Shapes, low_rank: Collection[str], layout: str, world: int, compute_bytes: int = 4
) -> dict[str, FlatPartition]:
    """Which elements of each parameter each rank of a shard group holds; see ``estimate`` for the arguments."""
    given = {name: tuple(shape) for name, shape in shapes.items()}
    if layout == "fsdp1":
        return {
            name: partition
            for unit in units(given)
            for name, partition in _flat_unit(unit, world, compute_bytes)[0].items()
        }
    partitions: dict[str, FlatPartition] = {}
    # ZeRO-1 and 2 have a flat buffer for each parameter group: the low-rank matrices, and the others.
    for part in parameter_groups(given, low_rank):
        partitions |= {name: FlatPartition(ranges) for name, ranges in _divide_group(part, layout, world).items()}
    return partitions


def shard_numel(shapes: Shapes, low_rank: Collection[str], layout: str, world: int, compute_bytes: int = 4) -> int:
    """How many elements every rank's share of the parameters takes, padding included; equal on all ranks."""
    given = {name: tuple(shape) for name, shape in shapes.items()}
    if layout == "fsdp1":
        return sum(_flat_unit(unit, world, compute_bytes)[1] for unit in units(given))
    if layout == "fsdp2":
        return sum(-(-shape[0] // world) * math.prod(shape[1:]) for shape in given.values())
    if layout == "zero":
        sizes = [sum(map(math.prod, part.values())) for part in parameter_groups(given, low_rank)]
        return sum(_flat_partition(size, world) for size in sizes)
    return sum(-(-math.prod(shape) // (world if layout == "zero3" else 1)) for shape in given.values())


def parameter_groups(
    shapes: Mapping[str, tuple[int, ...]], low_rank: Collection[str]
) -> list[dict[str, tuple[int, ...]]]:
    """The parameter groups that ``APOLLO(model)`` makes: low-rank matrices, and the others."""
    low = {name: shape for name, shape in shapes.items() if name in low_rank}
    return [part for part in (low, {n: s for n, s in shapes.items() if n not in low_rank}) if part]


def units(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Parameters by the module that the trainers wrap: first the root's own, then those of each numbered block."""
    found: dict[str, dict[str, tuple[int, ...]]] = {"": {}}
    for name, shape in shapes.items():
        parts = name.split(".")
        block = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        found.setdefault(".".join(parts[: block + 1]), {})[name] = shape
    return [unit for unit in found.values() if unit]


def _flat_unit(
    unit: Mapping[str, tuple[int, ...]], world: int, compute_bytes: int
) -> tuple[dict[str, FlatPartition], int]:
    """FSDP1's flat parameter of one wrapped module: the partitions, and the elements of one rank's part."""
    aligned = max(1, _FSDP1_ALIGNMENT // compute_bytes)
    starts, end = [], 0
    for shape in unit.values():
        starts.append(-(-end // aligned) * aligned)
        end = starts[-1] + math.prod(shape)
    part = -(-end // world)
    return {
        name: FlatPartition(cut_ranges(at, math.prod(shape), part, world))
        for (name, shape), at in zip(unit.items(), starts, strict=True)
    }, part


def _divide_group(shapes: Mapping[str, tuple[int, ...]], layout: str, world: int) -> dict[str, tuple[Range, ...]]:
    """Which elements of each parameter of a parameter group each rank holds; ``world`` is 1 where all hold all."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if layout == "fsdp2":
        rows = {name: (shape[0], sizes[name] // max(shape[0], 1)) for name, shape in shapes.items()}
        # Equal parameters share their ranges, so that what is made of them is made once.
        known = {key: row_ranges(*key, world) for key in set(rows.values())}
        return {name: known[key] for name, key in rows.items()}
    if layout == "zero":
        partition = _flat_partition(sum(sizes.values()), world)
        starts = accumulate(sizes.values(), initial=0)
        return {n: cut_ranges(at, size, partition, world) for (n, size), at in zip(sizes.items(), starts, strict=False)}
    even = {size: even_ranges(size, world) for size in set(sizes.values())}
    return {name: even[size] for name, size in sizes.items()}


def _flat_partition(numel: int, world: int) -> int:
    """Elements of a rank's partition: a group's flat buffer is padded to a multiple of two elements for each rank."""
    return 2 * -(-numel // (2 * world))


def _specs(
    low: Mapping[str, tuple[int, ...]],
    partitions: Mapping[str, FlatPartition],
    declared: Callable[[str, int, int], Spec],
) -> list[MatrixSpec]:
    """What is exchanged of matrices: ``declared`` takes a name and the shape m, n."""
    specs = []
    known: dict[tuple[int, tuple[int, ...]], list[tuple[tuple[Tile, ...], ...]]] = {}
    for name, shape in low.items():
        count, m, n = matrices(shape)
        partition = partitions[name]
        key = (id(partition.ranges), shape)
        if key not in known:
            known[key] = [partition.tiles(i, m, n) for i in range(count)]
        spec = declared(name, m, n)
        specs += [exchanged(matrix_name(name, i, count), m, n, spec, held) for i, held in enumerate(known[key])]
    return specs


def _sub_groups(shapes: Mapping[str, tuple[int, ...]], size: int, world: int) -> list[dict[str, tuple[int, ...]]]:
    """ZeRO-3's rule: a sub-group ends with the parameter whose partition fills it."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled >= size:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += -(-math.prod(shape) // world)
    return parts
