"""Memory and traffic of a run, from the plan that the run would make. Integers only: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .exchange.plan import make_plan
from .groups import check_matrix, is_low_rank_name
from .layout.holding import matrices, matrix_name
from .layout.tiles import FlatCover, Range, cut_ranges, even_ranges, row_ranges
from .matrix import spec_of

LAYOUTS = ("whole", "fsdp2", "zero", "zero3")
NUMBER = 4  # bytes: states and exchanges are fp32

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Estimate:
    """What each rank of a shard group keeps and sends.

    Attributes:
        state_bytes: of optimizer state on each rank, as ``APOLLO.state_bytes()`` reports after the first step.
        exchange_bytes: that leave each rank in one step.
        collectives: in one step; the same on every rank.
    """

    state_bytes: tuple[int, ...]
    exchange_bytes: tuple[int, ...]
    collectives: int


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
) -> Estimate:
    """Predict memory and traffic for a model's trainable parameters.

    Args:
        shapes: canonical name -> logical shape, in the model's order.
        rank: r of the low-rank matrices.
        scale_type, disable_nl: as in ``APOLLO``.
        world: ranks of the shard group.
        layout: "whole" (one process, DDP, ZeRO-0), "fsdp2", "zero" (ZeRO-1 and 2) or "zero3".
        low_rank: names of the low-rank parameters; by default chosen by name and shape.
        sub_group_size: DeepSpeed's option of that name, for "zero3".

    Raises:
        ValueError: for an unknown layout, or a parameter that cannot be low-rank.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    chosen = {name for name, shape in shapes.items() if is_low_rank_name(name, tuple(shape))}
    chosen = chosen if low_rank is None else set(low_rank)
    options = {"rank": rank, "scale_type": scale_type, "disable_nl": disable_nl}
    low = {name: tuple(shape) for name, shape in shapes.items() if name in chosen}
    rest = {name: tuple(shape) for name, shape in shapes.items() if name not in chosen}
    ranks = 1 if layout == "whole" else world
    state, sent, collectives = [0] * ranks, [0] * ranks, 0
    for ranges in _divide(rest, layout, ranks).values():
        for k, (start, stop) in enumerate(ranges):
            state[k] += 2 * NUMBER * (stop - start)
    for part in _sub_groups(low, sub_group_size, ranks) if layout == "zero3" else [low]:
        specs = []
        for name, ranges in _divide(part, layout, ranks).items():
            check_matrix(name, low[name], rank)
            count, m, n = matrices(low[name])
            tiles = [FlatCover(ranges).tiles(i, m, n) for i in range(count)]
            specs += [spec_of(matrix_name(name, i, count), m, n, options, held) for i, held in enumerate(tiles)]
        plan = make_plan(specs, ranks)
        collectives += plan.needs_exchange1 + plan.needs_exchange2
        for k in range(ranks):
            # Two moments for each owned number, and the limiter's last norm for each matrix.
            state[k] += NUMBER * (2 * plan.owned_numbers(k) + len(specs))
            sent[k] += NUMBER * sum(plan.numbers_sent(k))
    replicas = world // ranks
    return Estimate(tuple(state) * replicas, tuple(sent) * replicas, collectives)


def state_bytes(shapes: Shapes, rank: int, scale_type: str, world: int, layout: str) -> tuple[int, ...]:
    """Bytes of optimizer state on each rank; see ``estimate``."""
    return estimate(shapes, rank, scale_type=scale_type, world=world, layout=layout).state_bytes


def _divide(shapes: Mapping[str, tuple[int, ...]], layout: str, world: int) -> dict[str, tuple[Range, ...]]:
    """Which elements of each parameter of a parameter group each rank holds; ``world`` is 1 where all hold all."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if layout == "fsdp2":
        return {n: row_ranges(shape[0], sizes[n] // max(shape[0], 1), world) for n, shape in shapes.items()}
    if layout == "zero":
        # The group's flat buffer is padded to a multiple of two elements for each rank.
        partition = 2 * -(-sum(sizes.values()) // (2 * world))
        starts = accumulate(sizes.values(), initial=0)
        return {n: cut_ranges(at, size, partition, world) for (n, size), at in zip(sizes.items(), starts, strict=False)}
    return {name: even_ranges(size, world) for name, size in sizes.items()}


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
