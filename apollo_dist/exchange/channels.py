"""How the ranks of a shard group divide one matrix: integers only, made once for all matrices with equal tiles.

A *run* is a maximal run of consecutive channels with the same holders. Runs with one holder (*alone*) need no
communication; the channels of the others are dealt to owners in ``ownership.py``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..sharding.regions import Range, Tile, joined

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChannelSet:
    """Some channels of a matrix, as disjoint ranges, numbered one after the other from 0 in the order given."""

    ranges: tuple[Range, ...]

    @cached_property
    def count(self) -> int:
        """How many channels."""
        return sum(stop - start for start, stop in self.ranges)

    def positions(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The parts of channels start .. stop that are in the set: (start, stop, position in the set)."""
        found = []
        position = 0
        for a, b in self.ranges:
            low, high = max(a, start), min(b, stop)
            if low < high:
                found.append((low, high, position + low - a))
            position += b - a
        return found

    def __add__(self, other: ChannelSet) -> ChannelSet:
        return ChannelSet(self.ranges + other.ranges)

    @staticmethod
    def merged(ranges: Sequence[Range]) -> ChannelSet:
        """The channels of the given ranges, which come in channel order; neighbours become one range."""
        return ChannelSet(joined(ranges))


@dataclass(frozen=True, eq=False)
class Run:
    """Channels start .. stop with the same holders, in rank order."""

    start: int
    stop: int
    holders: npt.NDArray[np.int32]


class Overlaps(NamedTuple):
    """Where tiles meet ranges of channels; arrays of equal length, ordered by tile, then by range.

    Attributes:
        range: number of the range.
        tile: number of the tile.
        first, last: the channels that both have.
        elements: the tile's elements in those channels.
    """

    range: Integers
    tile: Integers
    first: Integers
    last: Integers
    elements: Integers


class ChannelPartition:
    """The tiles of an m x n matrix on all ranks of a shard group, and its runs.

    Args:
        m, n: shape.
        by_rows: whether rows are the channels, and not columns.
        tiles: for each rank its tiles; they cover the matrix exactly once.

    Attributes:
        rank: of each tile, ascending; tiles of one rank keep their order.
        number: which tile of its rank each one is.
        start, stop: channels of each tile.
        inner_start, inner_stop: its range along the projected dimension.
        alone_start, alone_stop, alone_owner: runs with one holder, in channel order.
        shared: the other runs, in channel order.
    """

    def __init__(self, m: int, n: int, by_rows: bool, tiles: Sequence[Sequence[Tile]]) -> None:
        self.m, self.n, self.by_rows = m, n, by_rows
        rows = [
            (rank, k, *tile.channels(self.by_rows), *tile.inner(self.by_rows))
            for rank, held in enumerate(tiles)
            if held
            for k, tile in enumerate(held)
            if tile.numel
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 6)
        self.rank, self.number, self.start, self.stop, self.inner_start, self.inner_stop = table.T.copy()
        self.digest = hashlib.sha256(repr((m, n, by_rows)).encode() + table.tobytes()).digest()
        self.shared: list[Run] = []
        alone: list[tuple[int, int, int]] = []
        for start, stop, holders in self._runs():
            if len(holders) == 1:
                alone.append((start, stop, holders[0]))
            else:
                self.shared.append(Run(start, stop, np.array(holders, dtype=np.int32)))
        self.alone_start, self.alone_stop, self.alone_owner = np.array(alone, dtype=np.int64).reshape(-1, 3).T.copy()

    @cached_property
    def participants(self) -> Integers:
        """The ranks that hold any of it, ascending."""
        return np.unique(self.rank)

    def elements(self, world: int) -> Integers:
        """How many elements each of ``world`` ranks holds."""
        found = np.zeros(world, dtype=np.int64)
        np.add.at(found, self.rank, (self.stop - self.start) * (self.inner_stop - self.inner_start))
        return found

    def tiles_of(self, rank: int) -> slice:
        """Which tiles are a rank's."""
        first, last = np.searchsorted(self.rank, (rank, rank + 1))
        return slice(int(first), int(last))

    def overlaps(self, starts: Integers, stops: Integers, tiles: slice = slice(None)) -> Overlaps:
        """Where tiles meet ranges of channels.

        Args:
            starts, stops: disjoint ranges in channel order.
            tiles: which tiles to look at.
        """
        first, last = self.start[tiles], self.stop[tiles]
        low = np.searchsorted(stops, first, side="right")
        count = np.maximum(np.searchsorted(starts, last, side="left") - low, 0)
        tile = np.repeat(np.arange(len(first)), count)
        number = np.arange(len(tile)) + np.repeat(low - (np.cumsum(count) - count), count)
        first, last = np.maximum(starts[number], first[tile]), np.minimum(stops[number], last[tile])
        tile = tile + (tiles.start or 0)
        return Overlaps(number, tile, first, last, (last - first) * (self.inner_stop[tile] - self.inner_start[tile]))

    def held(self, found: Overlaps, world_size: int) -> tuple[Integers, Integers, Integers]:
        """(range, holder, elements) for every holder of every range; ordered by range, then by rank."""
        return sum_by_holder(found.range, self.rank[found.tile], found.elements, world_size)

    def _runs(self) -> list[tuple[int, int, list[int]]]:
        """Runs of channels with the same holders, in channel order."""
        gained, lost = defaultdict(list), defaultdict(list)
        for rank, start, stop in self._covered():
            gained[start].append(rank)
            lost[stop].append(rank)
        holding: set[int] = set()
        runs = []
        for start, stop in pairwise(sorted(gained.keys() | lost.keys())):
            # A rank's own ranges do not touch, so the holders change at every edge.
            holding.difference_update(lost[start])
            holding.update(gained[start])
            runs.append((start, stop, sorted(holding)))
        return runs

    def _covered(self) -> list[tuple[int, int, int]]:
        """(rank, start, stop): the channels that each rank holds any element of, as few ranges."""
        found: list[tuple[int, int, int]] = []
        order = np.lexsort((self.start, self.rank))
        for rank, start, stop in np.stack((self.rank, self.start, self.stop))[:, order].T.tolist():
            if found and found[-1][0] == rank and found[-1][2] >= start:
                found[-1] = (rank, found[-1][1], max(found[-1][2], stop))
            else:
                found.append((rank, start, stop))
        return found


@lru_cache(maxsize=256)
def held_channels(partition: ChannelPartition, rank: int) -> tuple[ChannelSet, ChannelSet]:
    """The channels that ``rank`` alone holds, and those that it and others hold."""
    mine = partition.alone_owner == rank
    alone = zip(partition.alone_start[mine].tolist(), partition.alone_stop[mine].tolist(), strict=True)
    starts = np.array([run.start for run in partition.shared], dtype=np.int64)
    stops = np.array([run.stop for run in partition.shared], dtype=np.int64)
    # A rank that holds any of a run holds some of each of its channels.
    runs = np.unique(partition.overlaps(starts, stops, partition.tiles_of(rank)).range)
    shared = zip(starts[runs].tolist(), stops[runs].tolist(), strict=True)
    return ChannelSet.merged(list(alone)), ChannelSet.merged(list(shared))


def sum_by_holder(
    share: Integers, rank: Integers, elements: Integers, world_size: int
) -> tuple[Integers, Integers, Integers]:
    """Sum ``elements`` with equal share and rank; ordered by share, then by rank."""
    key = share * world_size + rank
    if len(key) and int(key.max()) < 4 * len(
        key
    ):  # most pairs occur: quicker than sorting; floats are exact below 2^53
        dense = np.bincount(key, elements)
        distinct: Integers = np.nonzero(dense)[0]
        total: Integers = dense[distinct].astype(np.int64)
    else:
        distinct, inverse = np.unique(key, return_inverse=True)
        total = np.zeros(len(distinct), dtype=np.int64)
        np.add.at(total, inverse, elements)
    return distinct // world_size, distinct % world_size, total
