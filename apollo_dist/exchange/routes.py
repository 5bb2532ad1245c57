"""What one rank sends and receives, piece by piece, from a plan. Integers only, and only this rank's view.

Both ends of a message list its parts alike: matrices in the plan's order, in each the segments in channel order, and of
elements the holder's tiles in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .channels import ChannelPartition, ChannelSet, held_channels, sum_by_holder

if TYPE_CHECKING:
    from ..sharding.regions import Range
    from .plan import MatrixPlan, Plan


class Projected(NamedTuple):
    """A rank's part of a matrix's low-rank gradient: channels from ``position`` on in what it projects."""

    matrix: int
    position: int
    channels: int
    numbers: int


class Elements(NamedTuple):
    """Gradient elements: channels ``first .. last`` of one of the rank's tiles, counted from the tile's first one.

    They travel row by row, as they lie in the tile.
    """

    matrix: int
    tile: int
    first: int
    last: int
    numbers: int


class Replies(NamedTuple):
    """What travels back of owned shared channels, from ``position`` on."""

    matrix: int
    position: int
    channels: int


@dataclass(frozen=True)
class Channels:
    """Which channels of one matrix a rank deals with.

    Attributes:
        local_only: held by this rank only, and so owned by it.
        shared: held by this rank and others.
        owned_shared: those of ``shared`` that this rank owns.
        projected: those of ``shared`` whose part of R this rank sends; of the others it sends elements.
        incoming_columns: hull of the columns of P for the elements that other ranks send, to be projected here; (0, 0)
            where there are none.
    """

    local_only: ChannelSet
    shared: ChannelSet
    owned_shared: ChannelSet
    projected: ChannelSet
    incoming_columns: Range

    @property
    def owned(self) -> ChannelSet:
        """The channels whose low-rank state lives here, in the order it is stored: ``local_only``, then shared ones."""
        return self.local_only + self.owned_shared

    @property
    def held(self) -> ChannelSet:
        """The channels this rank holds any element of: ``local_only``, then ``shared``."""
        return self.local_only + self.shared


@dataclass
class Route:
    """What travels between this rank and one other in exchange 1."""

    send: list[Projected | Elements] = field(default_factory=list)
    send_numbers: int = 0
    receive_numbers: int = 0
    # Projected parts: (offset in what this peer sends, offset in the accumulator, length).
    sums: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, piece: Projected | Elements) -> None:
        """Send one piece more."""
        self.send.append(piece)
        self.send_numbers += piece.numbers

    def expect(self, numbers: int) -> int:
        """Receive so many numbers more; returns their offset."""
        self.receive_numbers += numbers
        return self.receive_numbers - numbers

    def expect_sum(self, numbers: int, target: int) -> None:
        """Receive numbers more, which add to the accumulator at ``target``; neighbours are taken in one go."""
        offset = self.expect(numbers)
        if self.sums:
            last_offset, last_target, length = self.sums[-1]
            if last_offset + length == offset and last_target + length == target:
                self.sums[-1] = (last_offset, last_target, length + numbers)
                return
        self.sums.append((offset, target, numbers))


@dataclass
class Block:
    """Elements of the same channels from several tiles, which together are one operand of a product with P.

    Attributes:
        first, last: position of the channels in ``owned_shared``.
        inner: for each part its range along the projected dimension, ascending.
        places: for each part (peer, offset in what it sends).
    """

    first: int
    last: int
    inner: list[Range] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


class ReduceRoutes:
    """Exchange 1 as one rank of a plan sees it.

    Attributes:
        routes: one for each rank.
        sum_numbers: size of the accumulator of projected parts.
        owned: for each matrix (offset in the accumulator, channels) of each owned share.
        blocks: for each matrix the elements that come to be projected.
        channels: for each matrix the channels this rank deals with.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.routes = [Route() for _ in range(plan.world_size)]
        self.sum_numbers = 0
        self.owned: list[list[tuple[int, int]]] = []
        self.blocks: list[list[Block]] = []
        self.channels: list[Channels] = []
        for i, matrix in enumerate(plan.matrices):
            alone, shared = held_channels(matrix.partition, rank)
            nothing = ChannelSet(())
            self.owned.append([])
            self.blocks.append([])
            if not matrix.shared:
                self.channels.append(Channels(alone, nothing, nothing, nothing, (0, 0)))
                continue
            projected = self._sends(i, matrix, rank)
            owned = self._receives(i, matrix, rank, plan.world_size)
            hull = [edge for block in self.blocks[i] for part in block.inner for edge in part]
            incoming_columns = (min(hull), max(hull)) if hull else (0, 0)
            self.channels.append(Channels(alone, shared, owned, projected, incoming_columns))

    def _sends(self, i: int, matrix: MatrixPlan, rank: int) -> ChannelSet:
        """What this rank sends of one matrix; returns the channels of which it sends its part of R."""
        partition, shares = matrix.partition, matrix.shares
        found = partition.overlaps(shares.starts, shares.stops, partition.tiles_of(rank))
        elements = np.bincount(found.range, found.elements, minlength=len(shares.starts)).astype(np.int64)
        whole = matrix.spec.sends_elements(elements, shares.counts)
        parts: dict[int, list[Elements]] = defaultdict(list)
        for at, share in enumerate(found.range.tolist()):
            if whole[share]:
                tile, first, last = (int(values[at]) for values in (found.tile, found.first, found.last))
                origin = int(partition.start[tile])
                piece = Elements(i, int(partition.number[tile]), first - origin, last - origin, int(found.elements[at]))
                parts[share].append(piece)
        ranges: list[Range] = []
        position = 0
        for share in np.nonzero(elements)[0].tolist():
            route = self.routes[int(shares.owners[share])]
            if whole[share]:
                for piece in parts[share]:
                    route.add(piece)
                continue
            start, stop = int(shares.starts[share]), int(shares.stops[share])
            count = stop - start
            route.add(Projected(i, position, count, count * matrix.spec.numbers_per_channel))
            ranges.append((start, stop))
            position += count
        return ChannelSet.merged(ranges)

    def _receives(self, i: int, matrix: MatrixPlan, rank: int, world: int) -> ChannelSet:
        """What this rank receives of one matrix; returns the shared channels that it owns."""
        partition, shares = matrix.partition, matrix.shares
        mine = shares.owners == rank
        starts, stops = shares.starts[mine], shares.stops[mine]
        counts = stops - starts
        found = partition.overlaps(starts, stops)
        parts: dict[tuple[int, int], list[int]] = defaultdict(list)
        for at, key in enumerate(zip(found.range.tolist(), partition.rank[found.tile].tolist(), strict=True)):
            parts[key].append(at)
        held = sum_by_holder(found.range, partition.rank[found.tile], found.elements, world)
        whole = matrix.spec.sends_elements(held[2], counts[held[0]])
        positions = np.cumsum(counts) - counts
        targets = []
        for count in counts.tolist():
            targets.append(self.sum_numbers)
            self.owned[i].append((self.sum_numbers, count))
            self.sum_numbers += count * matrix.spec.numbers_per_channel
        blocks: dict[tuple[int, int], Block] = {}
        for share, holder, elements in zip(held[0].tolist(), held[1].tolist(), whole.tolist(), strict=True):
            route = self.routes[holder]
            if not elements:
                route.expect_sum(int(counts[share]) * matrix.spec.numbers_per_channel, targets[share])
                continue
            shift = int(positions[share] - starts[share])
            for at in parts[share, holder]:
                tile = int(found.tile[at])
                key = (int(found.first[at]) + shift, int(found.last[at]) + shift)
                block = blocks.setdefault(key, Block(*key))
                block.inner.append((int(partition.inner_start[tile]), int(partition.inner_stop[tile])))
                block.places.append((holder, route.expect(int(found.elements[at]))))
        self.blocks[i] = [_ascending(block) for block in blocks.values()]
        return ChannelSet.merged(list(zip(starts.tolist(), stops.tolist(), strict=True)))


def _ascending(block: Block) -> Block:
    order = sorted(range(len(block.inner)), key=block.inner.__getitem__)
    return Block(block.first, block.last, [block.inner[k] for k in order], [block.places[k] for k in order])


def held_shares(matrix: MatrixPlan, rank: int) -> list[int]:
    """The shares of a matrix that a rank holds any element of, in channel order."""
    partition: ChannelPartition = matrix.partition
    found = partition.overlaps(matrix.shares.starts, matrix.shares.stops, partition.tiles_of(rank))
    shares: list[int] = np.unique(found.range).tolist()
    return shares


class ReplyRoutes:
    """Exchange 2 as one rank of a plan sees it, if it is an all-to-all.

    A peer's message is its norm terms, then its channels' numbers.

    Attributes:
        send: for each rank the channels whose numbers go there.
        terms: for each rank the places in the terms, (matrices, columns) row by row, of matrices that both hold; equal
            lists are one object.
        send_numbers, receive_numbers: for each rank.
        replies: for each matrix (offset in what arrives, numbers) of each held share.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        world = plan.world_size
        self.send: list[list[Replies]] = [[] for _ in range(world)]
        self.terms = _common_terms(plan, rank)
        self.send_numbers = [len(places) for places in self.terms]
        self.receive_numbers = list(self.send_numbers)
        incoming: list[list[tuple[int, int, int]]] = [[] for _ in plan.matrices]
        for i, matrix in _with_replies(plan):
            width = matrix.spec.reply_numbers
            for share in held_shares(matrix, rank):
                owner, numbers = int(matrix.shares.owners[share]), int(matrix.shares.counts[share]) * width
                incoming[i].append((owner, self.receive_numbers[owner], numbers))
                self.receive_numbers[owner] += numbers
            position = 0
            for share in np.nonzero(matrix.shares.owners == rank)[0].tolist():
                count = int(matrix.shares.counts[share])
                for holder in matrix.run_of(share).holders.tolist():
                    self.send[holder].append(Replies(i, position, count))
                    self.send_numbers[holder] += count * width
                position += count
        base = np.concatenate(([0], np.cumsum(self.receive_numbers))).tolist()
        self.replies = [[(base[owner] + offset, numbers) for owner, offset, numbers in parts] for parts in incoming]


class ReplyAllReduce:
    """Exchange 2 as one rank of a plan sees it, if it is an all-reduce: all channels' numbers, then all terms.

    Attributes:
        owned: (what this rank writes, offset in the block).
        replies: for each matrix (offset in the block, numbers) of each held share.
        terms: the places in the terms that are summed.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.owned: list[tuple[Replies, int]] = []
        self.replies: list[list[tuple[int, int]]] = [[] for _ in plan.matrices]
        self.terms = [i * plan.term_columns + column for i, column in plan.term_places]
        base = 0
        for i, matrix in _with_replies(plan):
            counts = matrix.shares.counts
            numbers = counts * matrix.spec.reply_numbers
            offsets = (base + np.cumsum(numbers) - numbers).tolist()
            self.replies[i] = [(offsets[share], int(numbers[share])) for share in held_shares(matrix, rank)]
            position = 0
            for share in np.nonzero(matrix.shares.owners == rank)[0].tolist():
                self.owned.append((Replies(i, position, int(counts[share])), offsets[share]))
                position += int(counts[share])
            base += int(numbers.sum())


def _with_replies(plan: Plan) -> Iterator[tuple[int, MatrixPlan]]:
    for i, matrix in enumerate(plan.matrices):
        if matrix.shared and matrix.spec.reply_numbers:
            yield i, matrix


def _common_terms(plan: Plan, rank: int) -> list[list[int]]:
    """For each rank the places in the terms of matrices that it and ``rank`` hold."""
    common = np.zeros((len(plan.matrices), plan.world_size), dtype=bool)
    for i, matrix in enumerate(plan.matrices):
        if rank in matrix.participants:
            common[i, matrix.participants] = True
    known: dict[bytes, list[int]] = {}
    found = []
    for key, held in zip(map(bytes, np.packbits(common, axis=0).T), common.T, strict=True):
        if key not in known:
            chosen = np.nonzero(held)[0].tolist()
            known[key] = [
                i * plan.term_columns + column for i in chosen for column in range(plan.matrices[i].spec.terms)
            ]
        found.append(known[key])
    return found
