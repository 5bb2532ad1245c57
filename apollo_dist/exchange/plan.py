"""Who owns which channels of which matrix, and what travels where. Integers only, frozen, hashed.

A *channel* is an index along a matrix's larger dimension (rows if m >= n). Its *holders* are the ranks of the shard
group that hold at least one of its elements; its *owner* is the one holder that keeps its low-rank state. A *segment*
is a run of consecutive channels with the same holders and the same owner. Every rank computes the same plan alone,
from the tiles of all ranks; the plan's hash is compared before the first exchange.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..layout.tiles import Range, Tile, check_cover


@dataclass(frozen=True)
class MatrixSpec:
    """A logical matrix as the planner sees it.

    Attributes:
        name: canonical name.
        m, n: shape.
        rank: r of the projection.
        channel_norms: whether the squared norm of each channel's gradient travels with its low-rank gradient.
        channel_scales: whether each channel has a scaling factor of its own, which travels back.
        terms: which columns of the matrix's norm terms must be summed over its ranks (see ``rule.norms``).
        tiles: for each rank of the shard group its tiles.
    """

    name: str
    m: int
    n: int
    rank: int
    channel_norms: bool
    channel_scales: bool
    terms: tuple[int, ...]
    tiles: tuple[tuple[Tile, ...], ...]

    @property
    def tall(self) -> bool:
        """Whether rows are the channels."""
        return self.m >= self.n

    @property
    def numbers_per_channel(self) -> int:
        """How many numbers exchange 1 carries for each shared channel and holder."""
        return self.rank + int(self.channel_norms)


@dataclass(frozen=True)
class Segment:
    """Channels start .. stop, their holders in rank order, and their owner."""

    start: int
    stop: int
    holders: tuple[int, ...]
    owner: int

    @property
    def count(self) -> int:
        """How many channels."""
        return self.stop - self.start

    @property
    def shared(self) -> bool:
        """Whether more than one rank holds them, so that they need communication."""
        return len(self.holders) > 1


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix's segments, in channel order, and the ranks that hold any of it."""

    spec: MatrixSpec
    segments: tuple[Segment, ...]
    participants: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether any channel has several holders."""
        return any(s.shared for s in self.segments)


@dataclass(frozen=True)
class Plan:
    """All matrices of one shard group that step together."""

    world_size: int
    matrices: tuple[MatrixPlan, ...]

    @cached_property
    def needs_exchange1(self) -> bool:
        """Whether partial low-rank gradients must travel; the same on every rank."""
        return any(m.shared for m in self.matrices)

    @cached_property
    def needs_exchange2(self) -> bool:
        """Whether scaling factors or norm terms must travel; the same on every rank."""
        return any(
            (m.shared and m.spec.channel_scales) or (len(m.participants) > 1 and m.spec.terms) for m in self.matrices
        )

    @cached_property
    def digest(self) -> str:
        """sha256 of all integers and names in the plan."""
        text = hashlib.sha256()
        for m in self.matrices:
            s = m.spec
            text.update(repr((s.name, s.m, s.n, s.rank, s.channel_norms, s.channel_scales, s.terms)).encode())
            for g in m.segments:
                text.update(repr((g.start, g.stop, g.holders, g.owner)).encode())
        return text.hexdigest()

    @property
    def shared_channels(self) -> int:
        """How many channels, over all matrices, have several holders."""
        return sum(s.count for m in self.matrices for s in m.segments if s.shared)

    def owned_numbers(self, rank: int) -> int:
        """How many low-rank numbers of one moment ``rank`` stores."""
        return sum(s.count * m.spec.rank for m in self.matrices for s in m.segments if s.owner == rank)

    def numbers_sent(self, rank: int) -> tuple[int, int]:
        """How many numbers ``rank`` sends to other ranks in exchange 1 and in exchange 2 of each step."""
        first = second = 0
        for m in self.matrices:
            for s in m.segments:
                if s.shared and rank in s.holders:
                    if s.owner != rank:
                        first += s.count * m.spec.numbers_per_channel
                    elif m.spec.channel_scales:
                        second += s.count * (len(s.holders) - 1)
            if rank in m.participants:
                second += len(m.spec.terms) * (len(m.participants) - 1)
        return first, second


def make_plan(specs: Sequence[MatrixSpec], world_size: int) -> Plan:
    """Plan the exchange of the given matrices over a shard group of ``world_size`` ranks.

    Ownership is balanced greedily: the channels of each run of equal holders are split evenly among them, and what
    does not divide goes to those that own least so far.

    Raises:
        ValueError: if the tiles do not cover a matrix exactly once.
    """
    load = [0] * world_size
    plans = []
    for spec in specs:
        assert len(spec.tiles) == world_size
        check_cover(spec.name, spec.m, spec.n, spec.tiles)
        segments: list[Segment] = []
        for start, stop, holders in _runs(spec):
            for s in _split(start, stop, holders, load):
                load[s.owner] += s.count * spec.rank
                segments.append(s)
        participants = tuple(rank for rank, tiles in enumerate(spec.tiles) if tiles)
        plans.append(MatrixPlan(spec, tuple(segments), participants))
    return Plan(world_size, tuple(plans))


def _runs(spec: MatrixSpec) -> list[tuple[int, int, tuple[int, ...]]]:
    """Maximal runs of channels with the same holders: (start, stop, holders)."""
    events: list[tuple[int, int, int]] = []
    for rank, tiles in enumerate(spec.tiles):
        for tile in tiles:
            start, stop = tile.channels(spec.tall)
            events += [(start, 1, rank), (stop, -1, rank)]
    events.sort()
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    holding: dict[int, int] = {}
    at = 0
    for edge, change, rank in events:
        if edge > at:
            holders = tuple(sorted(holding))
            if runs and runs[-1][2] == holders:
                runs[-1] = (runs[-1][0], edge, holders)
            else:
                runs.append((at, edge, holders))
            at = edge
        holding[rank] = holding.get(rank, 0) + change
        if not holding[rank]:
            del holding[rank]
    return runs


def _split(start: int, stop: int, holders: tuple[int, ...], load: list[int]) -> list[Segment]:
    """Divide a run of channels among its holders."""
    if len(holders) == 1:
        return [Segment(start, stop, holders, holders[0])]
    base, extra = divmod(stop - start, len(holders))
    favoured = set(sorted(holders, key=lambda rank: (load[rank], rank))[:extra])
    segments = []
    for rank in holders:
        count = base + (rank in favoured)
        if count:
            segments.append(Segment(start, start + count, holders, rank))
            start += count
    assert start == stop
    return segments


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


def merged(segments: Sequence[Segment]) -> ChannelSet:
    """The channels of the given segments; neighbours become one range."""
    ranges: list[Range] = []
    for s in segments:
        if ranges and ranges[-1][1] == s.start:
            ranges[-1] = (ranges[-1][0], s.stop)
        else:
            ranges.append((s.start, s.stop))
    return ChannelSet(tuple(ranges))
