"""Covers made of index runs along each dimension: DTensors on several mesh axes, or on another dim than the first.

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
class GridCover:
    """Which runs of a parameter's indices each rank of a shard group holds.

    ``runs[k][d]`` are rank k's half-open runs along dimension d, in the order of its local tensor; it may have none.
    """

    runs: tuple[tuple[Runs, ...], ...]

    def numel(self, rank: int) -> int:
        """How many elements rank ``rank`` holds."""
        return math.prod(_count(along) for along in self.runs[rank])

    def held(self, rank: int) -> list[tuple[int, ...]]:
        """What rank ``rank`` holds, as plain integers (dimension, start, stop): checkpoints compare it."""
        return [(dim, *run) for dim, along in enumerate(self.runs[rank]) for run in along]

    def boxes(self, rank: int, shape: tuple[int, ...]) -> list[Box]:
        """What rank ``rank`` holds of the parameter, whose shape is ``shape``, as boxes.

        A box lies without gaps in the local tensor, so the dimensions before one with several runs are taken index by
        index.
        """
        assert len(shape) == len(self.runs[rank])
        return _boxes(self.runs[rank]) if self.numel(rank) else []

    def tiles(self, index: int, m: int, n: int) -> tuple[tuple[Tile, ...], ...]:
        """For each rank its tiles of the ``index``-th m x n matrix of the parameter (0 for a 2-D parameter)."""
        result = []
        for rank, runs in enumerate(self.runs):
            found = []
            for box in _boxes(runs) if self.numel(rank) else ():
                (row, column), (height, width) = box.offsets[-2:], box.sizes[-2:]
                first, count = (box.offsets[0], box.sizes[0]) if len(runs) == 3 else (0, 1)
                if first <= index < first + count:
                    found.append(Tile(row, column, height, width, box.offset + (index - first) * height * width))
            result.append(tuple(found))
        return tuple(result)


def _boxes(runs: Sequence[Runs]) -> list[Box]:
    sizes = [_count(along) for along in runs]
    strides = [math.prod(sizes[d + 1 :]) for d in range(len(runs))]
    last = max((d for d, along in enumerate(runs) if len(along) > 1), default=0)
    # For each dimension its pieces: (start, stop, position in the local tensor).
    pieces: list[list[tuple[int, int, int]]] = []
    for d, along in enumerate(runs):
        cut = along if d >= last else [(i, i + 1) for start, stop in along for i in range(start, stop)]
        position, placed = 0, []
        for start, stop in cut:
            placed.append((start, stop, position))
            position += stop - start
        pieces.append(placed)
    return [
        Box(
            tuple(start for start, _, _ in chosen),
            tuple(stop - start for start, stop, _ in chosen),
            sum(position * stride for (_, _, position), stride in zip(chosen, strides, strict=True)),
        )
        for chosen in product(*pieces)
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
