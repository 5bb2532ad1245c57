"""Partitions made of index runs along each dimension: DTensors on several mesh axes, or on another dim than the first.

A rank holds the product of some runs of rows and some runs of columns. Its local tensor has them in order, without
what lies between::

        . # # . #       rows 1..3, columns 1..3 and 4..5
        . # # . #       local tensor (2, 3)
        . . . . .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .regions import Box, Range, Tile, joined

Runs = tuple[Range, ...]


@dataclass(frozen=True)
class GridPartition:
    """Which runs of a parameter's indices each rank of a shard group holds.

    ``runs[k][d]`` are rank k's half-open runs along dimension d, in the order of its local tensor; it may have none.
    """

    runs: tuple[tuple[Runs, ...], ...]

    def numel(self, rank: int) -> int:
        """How many elements rank ``rank`` holds."""
        return math.prod(_count(along) for along in self.runs[rank])

    def signature(self, rank: int) -> list[tuple[int, ...]]:
        """What rank ``rank`` holds, as plain integers (dimension, start, stop): checkpoints compare it."""
        return [(dim, *run) for dim, along in enumerate(self.runs[rank]) for run in along]

    def boxes(self, rank: int, shape: tuple[int, ...]) -> list[Box]:
        """What rank ``rank`` holds of the parameter, of that shape, as boxes: one for each choice of runs."""
        assert len(shape) == len(self.runs[rank])
        return _boxes(self.runs[rank]) if self.numel(rank) else []

    def tiles(self, index: int, m: int, n: int) -> tuple[tuple[Tile, ...], ...]:
        """For each rank its tiles of the ``index``-th m x n matrix of the parameter (0 for a 2-D parameter).

        One tile for each run of rows and run of columns, however the local tensor's rows are put together.
        """
        # A vector is a matrix of one column.
        return tuple(_tiles(runs if len(runs) > 1 else (*runs, ((0, 1),)), index) for runs in self.runs)


def _tiles(runs: Sequence[Runs], index: int) -> tuple[Tile, ...]:
    *before, rows, columns = runs
    height, width = _count(rows), _count(columns)
    place = _place(before[0], index) if before else 0
    if place is None or not height or not width:
        return ()
    stride = width if len(columns) > 1 else 0
    return tuple(
        Tile(row, column, row_stop - row, column_stop - column, (place * height + down) * width + across, stride)
        for down, (row, row_stop) in _placed(rows)
        for across, (column, column_stop) in _placed(columns)
    )


def _placed(along: Runs) -> list[tuple[int, Range]]:
    """Each run with its position in the local tensor."""
    found, at = [], 0
    for start, stop in along:
        found.append((at, (start, stop)))
        at += stop - start
    return found


def _place(along: Runs, index: int) -> int | None:
    """The position of an index in the local tensor; None if it is not there."""
    return next((at + index - start for at, (start, stop) in _placed(along) if start <= index < stop), None)


def positions(held: Runs, wanted: Runs) -> list[Range]:
    """Where the indices ``wanted``, in their order, lie in a local tensor of the indices ``held``.

    Raises:
        ValueError: if one of them is not held.
    """
    found: list[Range] = []
    for start, stop in wanted:
        while start < stop:
            at = _place(held, start)
            if at is None:
                raise ValueError(f"index {start} is not among {held}")
            end = next(last for first, last in held if first <= start < last)
            found.append((at, at + min(end, stop) - start))
            start = min(end, stop)
    return found


def _boxes(runs: Sequence[Runs]) -> list[Box]:
    sizes = [_count(along) for along in runs]
    strides = tuple(math.prod(sizes[d + 1 :]) for d in range(len(runs)))
    return [
        Box(
            tuple(start for _, (start, _) in chosen),
            tuple(stop - start for _, (start, stop) in chosen),
            sum(position * stride for (position, _), stride in zip(chosen, strides, strict=True)),
            strides,
        )
        for chosen in product(*map(_placed, runs))
    ]


def _count(along: Runs) -> int:
    return sum(stop - start for start, stop in along)


def chunk(along: Runs, pieces: int, index: int) -> Runs:
    """The ``index``-th of ``pieces`` parts of an index sequence, by ``torch.chunk``'s rule: the last may be empty."""
    total = _count(along)
    size = -(-total // pieces)
    return _positions(along, min(index * size, total), min((index + 1) * size, total))


def strided_chunk(along: Runs, pieces: int, index: int, factor: int) -> Runs:
    """The same for DTensor's ``_StridedShard``: each of ``factor`` chunks is cut, and part ``index`` of all kept."""
    return joined([run for k in range(factor) for run in chunk(chunk(along, factor, k), pieces, index)])


def _positions(along: Runs, first: int, last: int) -> Runs:
    """The runs at positions first .. last of the sequence."""
    found, at = [], 0
    for start, stop in along:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return tuple(found)
