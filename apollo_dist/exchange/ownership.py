"""Who keeps the low-rank state of channels that several ranks hold, so that every rank keeps about the same.

Channels with one holder are kept by it. The others are pooled by their holders: all runs with the same holders, of all
matrices, make one line of channels, which is cut among them so that the least loaded get most. So a rank owns many
channels of few matrices rather than few of many: it sends and receives fewer and longer pieces, and draws fewer
projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .channels import ChannelPartition, Integers

# Pools with common holders depend on each other: rounds of levelling one pool after the other, with the others as they
# are, reduce the sum of squared loads each time. From a start in proportion to elements few are needed.
_ROUNDS = 2


@dataclass(frozen=True, eq=False)
class MatrixClass:
    """``count`` matrices with the same partition and ``MatrixSpec.weight``."""

    partition: ChannelPartition
    weight: int
    count: int


@dataclass(frozen=True, eq=False)
class OwnedRanges:
    """The shared channels of one matrix, cut at run and owner boundaries; in channel order.

    Attributes:
        starts, stops: channels.
        runs: number of the run in ``ChannelPartition.shared``.
        owners: the rank that keeps them.
    """

    starts: Integers
    stops: Integers
    runs: Integers
    owners: Integers

    @property
    def counts(self) -> Integers:
        """How many channels each has."""
        counts: Integers = self.stops - self.starts
        return counts


@dataclass
class HolderPool:
    """All runs with the same holders: (family, run) each, laid one after the other."""

    holders: Integers
    runs: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0


def assign_owners(families: Sequence[MatrixClass], world: int) -> list[list[OwnedRanges]]:
    """For each family the shares of its matrices."""
    load = np.zeros(world, dtype=np.int64)
    for family in families:
        partition = family.partition
        alone = (partition.alone_stop - partition.alone_start) * (family.weight * family.count)
        np.add.at(load, partition.alone_owner, alone)
    pools = _pools(families)
    held = [family.count * family.partition.elements(world) for family in families]
    quotas = [_proportional(pool, held) for pool in pools]
    for pool, quota in zip(pools, quotas, strict=True):
        load[pool.holders] += quota
    cuts: list[list[Integers]] = [[] for _ in families]
    for last in (False,) * (_ROUNDS if len(pools) > 1 else 0) + (True,):
        for i, pool in enumerate(pools):
            load[pool.holders] -= quotas[i]
            quotas[i] = _level(load[pool.holders], pool.total)
            if last:
                quotas[i] = _cut(pool, quotas[i], families, cuts)
            load[pool.holders] += quotas[i]
    return [_by_matrix(family, found) for family, found in zip(families, cuts, strict=True)]


def _pools(families: Sequence[MatrixClass]) -> list[HolderPool]:
    pools: dict[bytes, HolderPool] = {}
    for f, family in enumerate(families):
        for i, run in enumerate(family.partition.shared):
            key = run.holders.tobytes()
            pool = pools.setdefault(key, HolderPool(run.holders.astype(np.int64)))
            pool.runs.append((f, i))
            pool.total += (run.stop - run.start) * family.weight * family.count
    return list(pools.values())


def _proportional(pool: HolderPool, held: Sequence[Integers]) -> Integers:
    """A first division of a pool: in proportion to the elements that its holders have of its matrices.

    ``held[f][k]`` are rank k's elements of family f.
    """
    elements = np.zeros(len(pool.holders), dtype=np.int64)
    for f in {f for f, _ in pool.runs}:
        elements += held[f][pool.holders]
    quota: Integers = (pool.total * (elements / elements.sum())).astype(np.int64)
    quota[0] += pool.total - quota.sum()
    return quota


def _level(load: Integers, total: int) -> Integers:
    """Divide ``total`` so that the loads become as equal as adding can make them; integers that sum to it."""
    order = np.argsort(load, kind="stable")
    rising = load[order]
    below = np.cumsum(rising)
    # How many of the least loaded would be filled to the level of the last of them with less than the total.
    number = int(np.searchsorted(rising * np.arange(1, len(load) + 1) - below, total, side="left"))
    level, rest = divmod(total + int(below[number - 1]), number)
    quota = np.zeros_like(load)
    quota[order[:number]] = level - rising[:number]
    quota[order[:rest]] += 1
    return quota


def _cut(pool: HolderPool, quota: Integers, families: Sequence[MatrixClass], cuts: list[list[Integers]]) -> Integers:
    """Cut a pool's line by its holders' quotas, to whole channels; returns what they got.

    Adds to ``cuts`` of each family rows of (run, start, stop, owner), positions counting from 0 through the run's
    channels in the family's matrices one after the other.
    """
    edges = np.concatenate(([0], np.cumsum(quota)))
    got = np.zeros_like(quota)
    at = 0
    for f, i in pool.runs:
        family, run = families[f], families[f].partition.shared[i]
        channels = (run.stop - run.start) * family.count
        bounds = np.clip((edges - at + family.weight // 2) // family.weight, 0, channels)
        counts = np.diff(bounds)
        chosen = np.nonzero(counts)[0]
        rows = (np.full_like(chosen, i), bounds[chosen], bounds[chosen + 1], pool.holders[chosen])
        cuts[f].append(np.stack(rows, axis=1))
        got += counts * family.weight
        at += channels * family.weight
    return got


def _by_matrix(family: MatrixClass, cuts: Sequence[Integers]) -> list[OwnedRanges]:
    """The shares of each matrix of a family, from rows as ``_cut`` makes them."""
    shared = family.partition.shared
    table = np.concatenate(cuts) if cuts else np.empty((0, 4), dtype=np.int64)
    length = np.array([run.stop - run.start for run in shared], dtype=np.int64)[table[:, 0]]
    # An owner's part of a line may reach over several matrices: one share in each.
    first = table[:, 1] // np.maximum(length, 1)
    count = -(-table[:, 2] // np.maximum(length, 1)) - first
    row = np.repeat(np.arange(len(table)), count)
    matrix = np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)
    runs, low, high, owners = table[row].T
    origin = np.array([run.start for run in shared], dtype=np.int64)[runs]
    base, length = matrix * length[row], length[row]
    starts = np.maximum(low - base, 0) + origin
    stops = np.minimum(high - base, length) + origin
    order = np.lexsort((starts, matrix))
    edges = np.searchsorted(matrix[order], np.arange(family.count + 1))
    return [
        OwnedRanges(*(values[order[a:b]] for values in (starts, stops, runs, owners)))
        for a, b in pairwise(edges.tolist())
    ]
