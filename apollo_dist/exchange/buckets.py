"""Exchange 1 in buckets, so that its memory is bounded, and one bucket travels while the next one is projected.

Each owner's shared channels, laid one after the other, are divided evenly among the buckets. So in each bucket every
rank receives about as much, and buckets of owners who receive one after the other, which would take that many times as
long, do not occur. Integers only, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .channels import sum_by_holder

if TYPE_CHECKING:
    from .channels import ChannelPartition, Integers
    from .ownership import OwnedRanges

# How many numbers a rank sends or receives in a bucket, about; 64 MB in fp32.
NUMBERS = 1 << 24
# Buckets begin at multiples of this many channels, as kernels take them.
CHANNELS = 64


class Line(NamedTuple):
    """The shared channels of one matrix: how it is divided, their owners, the numbers of each in a projected part."""

    partition: ChannelPartition
    shares: OwnedRanges
    numbers_per_channel: int


class Cuts(NamedTuple):
    """The shares of a matrix, cut where a bucket ends; in channel order.

    Attributes:
        shares: number of the share that each is part of.
        starts, stops: channels.
        buckets: in which they travel.
    """

    shares: Integers
    starts: Integers
    stops: Integers
    buckets: Integers


def elements_held(partition: ChannelPartition, shares: OwnedRanges, world: int) -> tuple[Integers, Integers, Integers]:
    """(share, holder, elements) for every holder of every share of a matrix."""
    found = partition.overlaps(shares.starts, shares.stops)
    return sum_by_holder(found.range, partition.rank[found.tile], found.elements, world)


def into_buckets(lines: Sequence[Line], world: int) -> tuple[int, list[Cuts]]:
    """How many buckets exchange 1 takes, and which part of each matrix travels in which.

    Args:
        lines: of all matrices; those that are not shared have no shares.
        world: ranks of the shard group.
    """
    if _few(lines, world):
        return 1, [_uncut(shares) for _, shares, _ in lines]
    sent, received = np.zeros((2, world), dtype=np.int64)
    numbers: list[Integers] = []
    known: dict[tuple[bytes, int], tuple[Integers, Integers, Integers]] = {}
    for partition, shares, width in lines:
        key = (partition.digest + shares.starts.tobytes(), width)
        if key not in known:
            share, holders, elements = elements_held(partition, shares, world)
            known = {key: (share, holders, np.minimum(elements, shares.counts[share] * width))}  # neighbours are alike
        share, holders, travelling = known[key]
        np.add.at(sent, holders, travelling)
        np.add.at(received, shares.owners[share], travelling)
        numbers.append(np.bincount(share, travelling, minlength=len(shares.owners)).astype(np.int64))
    count = max(1, -(-int(max(sent.max(), received.max())) // NUMBERS))
    if count == 1:
        return 1, [_uncut(shares) for _, shares, _ in lines]
    at = [0] * world
    totals = received.tolist()
    cut = []
    for (_, shares, _), each in zip(lines, numbers, strict=True):
        pieces = []
        rows = zip(*(v.tolist() for v in (shares.starts, shares.stops, shares.owners, each)), strict=True)
        for number, (start, stop, owner, size) in enumerate(rows):
            pieces += [(number, *piece) for piece in _cut(start, stop, at[owner], size, totals[owner], count)]
            at[owner] += size
        cut.append(Cuts(*np.array(pieces, dtype=np.int64).reshape(-1, 4).T.copy()))
    return count, cut


def _few(lines: Sequence[Line], world: int) -> bool:
    """Whether elements alone are few enough for one bucket: quickly found, and true on very many ranks."""
    held, owned = np.zeros((2, world), dtype=np.int64)
    known: dict[int, Integers] = {}
    for partition, shares, _ in lines:
        if partition.shared:
            if id(partition) not in known:
                known[id(partition)] = partition.elements(world)
            held += known[id(partition)]
            np.add.at(owned, shares.owners, shares.counts * (partition.n if partition.by_rows else partition.m))
    return int(max(held.max(), owned.max())) <= NUMBERS


def _uncut(shares: OwnedRanges) -> Cuts:
    return Cuts(np.arange(len(shares.owners)), shares.starts, shares.stops, np.zeros_like(shares.owners))


def _cut(start: int, stop: int, first: int, size: int, total: int, count: int) -> Iterable[tuple[int, int, int]]:
    """(start, stop, bucket) of the parts of a share.

    Args:
        start, stop: its channels.
        first, size: where it lies in all that its owner receives, and how much of it that is.
        total: all that its owner receives.
        count: of buckets.
    """
    if not size:  # nothing travels
        yield start, stop, 0
        return
    low = start
    for bucket in range(first * count // total, -(-(first + size) * count // total)):
        # Where the next bucket begins, in channels.
        high = start + ((bucket + 1) * total - first * count) * (stop - start) // (size * count)
        high = min(high // CHANNELS * CHANNELS, stop) if high < stop else stop
        if high > low:
            yield low, high, bucket
            low = high
