"""What one rank sends and receives in exchange 1, piece by piece, from a plan. Integers only, this rank's view.

Both ends of a message list its parts alike: matrices in the plan's order, in each the segments in channel order, and of
elements the holder's tiles in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .channels import ChannelSet, held_channels, sum_by_holder
from .messages import Elements, Projected

if TYPE_CHECKING:
    from ..sharding.regions import Range
    from .plan import MatrixPlan, Plan
    from .products import Product


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
        products: low-rank updates of owned channels that are multiplied here, for ranks that hold few elements.
        multiplied: positions in ``held`` of the channels whose low-rank update this rank multiplies; None for all.
    """

    local_only: ChannelSet
    shared: ChannelSet
    owned_shared: ChannelSet
    projected: ChannelSet
    incoming_columns: Range
    products: tuple[Product, ...] = ()
    multiplied: tuple[Range, ...] | None = None

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
    """What travels between this rank and one other in a bucket of exchange 1."""

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


class Place(NamedTuple):
    """Where a part of a block arrives: its channels, counted from the block's first one, and its inner range."""

    bucket: int
    peer: int
    offset: int
    first: int
    last: int
    inner: Range


@dataclass
class Block:
    """Elements of the same channels from several tiles, which together are one operand of a product with P.

    Attributes:
        first, last: position of the channels in ``owned_shared``.
        inner: of each tile its range along the projected dimension, ascending.
        places: where they arrive, by bucket and inner range; those of a bucket are of the same channels.
    """

    first: int
    last: int
    inner: list[Range] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


class Owned(NamedTuple):
    """Where the sum of projected parts of owned channels is: channels from ``position`` on in ``owned_shared``."""

    bucket: int
    offset: int
    position: int
    channels: int


class ReduceRoutes:
    """Exchange 1 as one rank of a plan sees it.

    Attributes:
        routes: by bucket, one for each rank.
        sum_numbers: by bucket the size of the accumulator of projected parts.
        owned: for each matrix the owned channels of each share.
        blocks: for each matrix the elements that come to be projected.
        channels: for each matrix the channels this rank deals with.
        sending: by bucket the matrices of which this rank sends anything, ascending.
        alike: by bucket whether all ranks send projected parts of the same channels here, and nothing else.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.routes = [[Route() for _ in range(plan.world_size)] for _ in range(plan.buckets)]
        self.sum_numbers = [0] * plan.buckets
        self.owned: list[list[Owned]] = []
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
        self.sending = [sorted({piece.matrix for route in each for piece in route.send}) for each in self.routes]
        self.alike = [_alike(each) for each in self.routes]

    def _sends(self, i: int, matrix: MatrixPlan, rank: int) -> ChannelSet:
        """What this rank sends of one matrix; returns the channels of which it sends its part of R."""
        partition, shares, cuts = matrix.partition, matrix.shares, matrix.cuts
        found = partition.overlaps(cuts.starts, cuts.stops, partition.tiles_of(rank))
        share_of = cuts.shares[found.range]
        elements = np.bincount(share_of, found.elements, minlength=len(shares.starts)).astype(np.int64)
        whole = matrix.spec.sends_elements(elements, shares.counts)
        parts: dict[int, list[Elements]] = defaultdict(list)
        for at, cut in enumerate(found.range.tolist()):
            if whole[share_of[at]]:
                tile, first, last = (int(values[at]) for values in (found.tile, found.first, found.last))
                origin = int(partition.start[tile])
                piece = Elements(i, int(partition.number[tile]), first - origin, last - origin, int(found.elements[at]))
                parts[cut].append(piece)
        ranges: list[Range] = []
        position = 0
        for cut, (share, start, stop, bucket) in enumerate(zip(*(v.tolist() for v in cuts), strict=True)):
            route = self.routes[bucket][int(shares.owners[share])]
            for piece in parts[cut]:
                route.add(piece)
            if elements[share] and not whole[share]:
                count = stop - start
                route.add(Projected(i, position, count, count * matrix.spec.numbers_per_channel))
                ranges.append((start, stop))
                position += count
        return ChannelSet.merged(ranges)

    def _receives(self, i: int, matrix: MatrixPlan, rank: int, world: int) -> ChannelSet:
        """What this rank receives of one matrix; returns the shared channels that it owns."""
        partition, shares, spec = matrix.partition, matrix.shares, matrix.spec
        mine = shares.owners == rank
        starts, stops = shares.starts[mine], shares.stops[mine]
        counts = stops - starts
        positions = (np.cumsum(counts) - counts - starts).tolist()  # of a share's channels in ``owned_shared``
        found = partition.overlaps(starts, stops)
        parts: dict[tuple[int, int], list[int]] = defaultdict(list)
        for at, key in enumerate(zip(found.range.tolist(), partition.rank[found.tile].tolist(), strict=True)):
            parts[key].append(at)
        held = sum_by_holder(found.range, partition.rank[found.tile], found.elements, world)
        whole = spec.sends_elements(held[2], counts[held[0]])
        holders: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        for share, holder, elements in zip(held[0].tolist(), held[1].tolist(), whole.tolist(), strict=True):
            holders[share].append((holder, elements))
        numbers = np.cumsum(mine) - 1  # of the share among those of this rank
        blocks: dict[tuple[int, int], Block] = {}
        for share, start, stop, bucket in zip(
            *(v[mine[matrix.cuts.shares]].tolist() for v in matrix.cuts), strict=True
        ):
            number, count = int(numbers[share]), stop - start
            shift, target = positions[number], self.sum_numbers[bucket]
            self.owned[i].append(Owned(bucket, target, start + shift, count))
            self.sum_numbers[bucket] += count * spec.numbers_per_channel
            for holder, elements in holders[number]:
                route = self.routes[bucket][holder]
                if not elements:
                    route.expect_sum(count * spec.numbers_per_channel, target)
                    continue
                for at in parts[number, holder]:
                    tile, first, last = (int(values[at]) for values in (found.tile, found.first, found.last))
                    block = blocks.setdefault((first, last), Block(first + shift, last + shift))
                    low, high = max(first, start), min(last, stop)
                    if low < high:
                        inner = int(partition.inner_start[tile]), int(partition.inner_stop[tile])
                        offset = route.expect((high - low) * (inner[1] - inner[0]))
                        block.places.append(Place(bucket, holder, offset, low - first, high - first, inner))
        self.blocks[i] = list(blocks.values())
        for block in self.blocks[i]:
            block.places.sort(key=lambda place: (place.bucket, place.inner))
            block.inner = [place.inner for place in block.places if place.bucket == block.places[0].bucket]
        return ChannelSet.merged(list(zip(starts.tolist(), stops.tolist(), strict=True)))


def _alike(routes: Sequence[Route]) -> bool:
    first, *others = routes
    same = all(r.sums == first.sums and r.receive_numbers == first.receive_numbers for r in others)
    return same and sum(length for _, _, length in first.sums) == first.receive_numbers > 0
