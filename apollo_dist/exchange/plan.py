"""Who owns which channels of which matrix, and what travels where. Integers only, frozen, hashed.

A *channel* is a row, a column or a block of rows of a matrix, as its rule asks. Its *holders* are the ranks of the
shard group that hold at least one of its elements; its *owner* is the one holder that keeps its state. A *segment* is a
run of consecutive channels with the same holders and the same owner. Every rank computes the same plan alone, from the
tiles of all ranks; the plan's hash is compared before the first exchange.

For each segment a holder sends its owner the smaller of two things: its part of the low-rank gradient (and of the
squared channel norms), or its gradient elements themselves, which the owner projects. The second is smaller where a
rank holds fewer than r elements of a channel: for a wide matrix in rows on more than m / r ranks. Low-rank updates come
back likewise, as numbers to multiply with P or as elements (``products.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..sharding.regions import Tile, check_cover
from .buckets import Cuts, Line, elements_held, into_buckets
from .channels import ChannelPartition, Integers, Run
from .ownership import MatrixClass, OwnedRanges, assign_owners


@dataclass(frozen=True)
class MatrixSpec:
    """A logical matrix as the planner sees it.

    Attributes:
        name: canonical name.
        m, n: shape.
        by_rows: whether rows are the channels, and not columns.
        rank: r of the projection; 0 without one.
        channel_norms: whether the squared norm of each channel travels to its owner.
        channel_scales: whether each channel has a scaling factor of its own, which travels back.
        low_rank_update: whether ``rank`` numbers of each channel travel back besides, or their products with P.
        whole: whether one owner needs all elements in each step.
        whole_in_bfloat16: whether they travel in bfloat16, both ways.
        shared_state: how many numbers every rank with a part of it keeps that one owner makes from all elements.
        shared_in_bfloat16: whether those travel and are kept in bfloat16.
        terms: how many numbers of the whole matrix are summed over its ranks.
        terms_first: whether they are summed before anything travels back, since that depends on them.
        state: for each kind of state that owners keep, how many numbers of it a channel has.
        matrix_state: how many numbers every rank keeps for the whole matrix.
        element_state: how many numbers a rank keeps for each element that it holds.
        tiles: for each rank of the shard group its tiles.
    """

    name: str
    m: int
    n: int
    by_rows: bool
    rank: int
    channel_norms: bool
    channel_scales: bool
    terms: int
    state: tuple[int, ...]
    matrix_state: int
    element_state: int
    tiles: tuple[tuple[Tile, ...], ...]
    low_rank_update: bool = False
    terms_first: bool = False
    whole: bool = False
    whole_in_bfloat16: bool = False
    shared_state: int = 0
    shared_in_bfloat16: bool = False

    @property
    def channels(self) -> int:
        """How many channels."""
        return self.m if self.by_rows else self.n

    @property
    def weight(self) -> int:
        """What a channel counts when owners are chosen: the numbers of its largest state, at least 1."""
        return max(self.state, default=1)

    @property
    def numbers_per_channel(self) -> int:
        """How many numbers a projected part has for each channel."""
        return self.rank + int(self.channel_norms)

    @property
    def reply_numbers(self) -> int:
        """How many numbers of each channel travel back."""
        return int(self.channel_scales) + self.low_rank_update * self.rank

    @property
    def late_terms(self) -> int:
        """How many terms are summed in exchange 2."""
        return 0 if self.terms_first else self.terms

    def sends_elements(self, elements: Integers, channels: Integers) -> npt.NDArray[np.bool_]:
        """Whether a holder with so many ``elements`` of so many ``channels`` sends them as they are, not projected."""
        return elements < channels * self.numbers_per_channel

    def replies_elements(self, elements: Integers, channels: Integers) -> npt.NDArray[np.bool_]:
        """Whether such a holder gets the elements of low-rank updates, and not what is to be multiplied with P."""
        return (elements < channels * self.rank) & self.low_rank_update


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


@dataclass(frozen=True, eq=False)
class MatrixPlan:
    """One matrix: how it is divided, who owns the channels that several ranks hold, and when they travel."""

    spec: MatrixSpec
    partition: ChannelPartition
    shares: OwnedRanges
    cuts: Cuts

    @property
    def shared(self) -> bool:
        """Whether any channel has several holders."""
        return bool(self.partition.shared)

    @property
    def participants(self) -> Integers:
        """The ranks that hold any of it, ascending."""
        return self.partition.participants

    def run_of(self, share: int) -> Run:
        """The run that a share is part of."""
        return self.partition.shared[int(self.shares.runs[share])]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments in channel order; made anew at each call, for inspection."""
        d, s = self.partition, self.shares
        alone = np.stack((d.alone_start, d.alone_stop, d.alone_owner), axis=1).tolist()
        found = [Segment(start, stop, (owner,), owner) for start, stop, owner in alone]
        for i, (start, stop, owner) in enumerate(np.stack((s.starts, s.stops, s.owners), axis=1).tolist()):
            found.append(Segment(start, stop, tuple(self.run_of(i).holders.tolist()), owner))
        return tuple(sorted(found, key=lambda segment: segment.start))


@dataclass(frozen=True, eq=False)
class Plan:
    """All matrices of one shard group that step together.

    Attributes:
        buckets: in how many collectives exchange 1 travels, if there is one.
    """

    world_size: int
    matrices: tuple[MatrixPlan, ...]
    buckets: int = 1
    _last_held: dict[bytes, tuple[Integers, Integers, Integers]] = field(default_factory=dict, repr=False)

    @cached_property
    def needs_exchange1(self) -> bool:
        """Whether partial low-rank gradients must travel; the same on every rank."""
        return any(m.shared and not m.spec.whole for m in self.matrices)

    @cached_property
    def needs_exchange2(self) -> bool:
        """Whether numbers of channels or terms must travel back; the same on every rank."""
        return bool(self.term_places) or any(m.shared and m.spec.reply_numbers for m in self.matrices)

    @cached_property
    def term_places(self) -> list[int]:
        """Where in the terms, (matrices, columns) row by row, those are that are summed over ranks in exchange 2."""
        return self._places(first=False)

    @cached_property
    def first_term_places(self) -> list[int]:
        """Where those are that are summed before it."""
        return self._places(first=True)

    def _places(self, *, first: bool) -> list[int]:
        summed = ((i, m.spec) for i, m in enumerate(self.matrices) if len(m.participants) > 1)
        return [i * self.term_columns + k for i, s in summed if s.terms_first == first for k in range(s.terms)]

    @property
    def term_columns(self) -> int:
        """The most terms that a matrix has."""
        return max((m.spec.terms for m in self.matrices), default=0)

    @cached_property
    def reduced_numbers(self) -> int:
        """How many numbers exchange 2 has if all ranks sum all replies and terms."""
        replies = sum(int(m.shares.counts.sum()) * m.spec.reply_numbers for m in self.matrices)
        return replies + len(self.term_places)

    @cached_property
    def reduces(self) -> bool:
        """Whether exchange 2 is one all-reduce, not an all-to-all: where that moves fewer numbers over all ranks.

        In an all-to-all a channel's numbers go only where they are needed, but norm terms go from each of a matrix's
        ranks to each other. Where channels have none, and on very many ranks, the terms decide.
        """
        return 2 * (self.world_size - 1) * self.reduced_numbers <= int(self._scattered.sum())

    @cached_property
    def _scattered(self) -> Integers:
        """How many numbers each rank sends to others if exchange 2 is an all-to-all."""
        sent = np.zeros(self.world_size, dtype=np.int64)
        for m in self.matrices:
            if m.spec.low_rank_update and m.shared:
                share, holders, elements = self._elements_held(m)
                owners, counts = m.shares.owners[share], m.shares.counts[share]
                numbers = np.minimum(elements, counts * m.spec.rank) + counts * int(m.spec.channel_scales)
                np.add.at(sent, owners, np.where(holders == owners, 0, numbers))
            elif m.spec.reply_numbers and m.shared:
                others = np.array([len(run.holders) - 1 for run in m.partition.shared], dtype=np.int64)
                numbers = m.shares.counts * m.spec.reply_numbers
                np.add.at(sent, m.shares.owners, numbers * others[m.shares.runs])
            sent[m.participants] += m.spec.late_terms * (len(m.participants) - 1)
        return sent

    @cached_property
    def digest(self) -> str:
        """sha256 of all integers and names in the plan."""
        text = hashlib.sha256(repr(self.world_size).encode())
        for m in self.matrices:
            text.update(repr(replace(m.spec, tiles=())).encode())
            text.update(m.partition.digest)
            for values in (m.shares.starts, m.shares.stops, m.shares.owners, m.cuts.stops, m.cuts.buckets):
                text.update(values.tobytes())
        return text.hexdigest()

    @property
    def shared_channels(self) -> int:
        """How many channels, over all matrices, have several holders."""
        return sum(int(m.shares.counts.sum()) for m in self.matrices)

    def owned_numbers(self, rank: int) -> int:
        """How many numbers of channels' state ``rank`` keeps."""
        return int(self._owned[rank])

    @cached_property
    def _owned(self) -> Integers:
        owned = np.zeros(self.world_size, dtype=np.int64)
        for m in self.matrices:
            numbers = sum(m.spec.state)
            np.add.at(owned, m.partition.alone_owner, (m.partition.alone_stop - m.partition.alone_start) * numbers)
            np.add.at(owned, m.shares.owners, m.shares.counts * numbers)
        return owned

    def numbers_sent(self, rank: int) -> tuple[int, int]:
        """How many numbers ``rank`` sends to other ranks in exchange 1, and after it, in each step.

        For an all-reduce: what its ring algorithm sends, 2 (world - 1) / world of the numbers, rounded up.
        """
        second = self.ring_numbers if self.reduces else int(self._scattered[rank])
        return int(self._sent1[rank]), self.first_term_numbers + second

    @property
    def ring_numbers(self) -> int:
        """How many numbers each rank sends in exchange 2 if it is an all-reduce."""
        return self._ring(self.reduced_numbers)

    @property
    def first_term_numbers(self) -> int:
        """How many numbers each rank sends for the terms that are summed before exchange 2, in an all-reduce."""
        return self._ring(len(self.first_term_places))

    def _ring(self, numbers: int) -> int:
        return -(-2 * numbers * (self.world_size - 1) // self.world_size)

    @cached_property
    def _sent1(self) -> Integers:
        sent = np.zeros(self.world_size, dtype=np.int64)
        for holders, owners, numbers in self.flows():
            np.add.at(sent, holders, np.where(holders == owners, 0, numbers))
        return sent

    def _elements_held(self, m: MatrixPlan) -> tuple[Integers, Integers, Integers]:
        """``elements_held``; kept for the next matrix, which is often alike."""
        key = m.partition.digest + m.shares.starts.tobytes()
        if key not in self._last_held:
            self._last_held.clear()
            self._last_held[key] = elements_held(m.partition, m.shares, self.world_size)
        return self._last_held[key]

    def flows(self) -> Iterator[tuple[Integers, Integers, Integers]]:
        """What travels in exchange 1, matrix by matrix: (holder, owner, how many numbers) of every message part."""
        for m in self.matrices:
            if not m.shared:
                continue
            share, holders, elements = self._elements_held(m)
            projected = m.shares.counts[share] * m.spec.numbers_per_channel
            yield holders, m.shares.owners[share], np.minimum(elements, projected)


def make_plan(specs: Sequence[MatrixSpec], world_size: int) -> Plan:
    """Plan the exchange of the given matrices over a shard group of ``world_size`` ranks.

    Matrices with equal tiles are looked at once. Owners are chosen so that every rank keeps about the same amount of
    state, as far as channels have several holders (``ownership.py``).

    Raises:
        ValueError: if the tiles do not cover a matrix exactly once.
    """
    partitions = _Partitions()
    families: dict[tuple[ChannelPartition, int], list[int]] = {}
    for i, spec in enumerate(specs):
        assert len(spec.tiles) == world_size
        families.setdefault((partitions.of(spec), spec.weight), []).append(i)
    listed = [MatrixClass(partition, weight, len(members)) for (partition, weight), members in families.items()]
    shares: dict[int, tuple[ChannelPartition, OwnedRanges]] = {}
    for family, members, dealt in zip(listed, families.values(), assign_owners(listed, world_size), strict=True):
        shares.update((i, (family.partition, share)) for i, share in zip(members, dealt, strict=True))
    lines = [Line(*shares[i], spec.numbers_per_channel) for i, spec in enumerate(specs)]
    count, cut = into_buckets(lines, world_size)
    matrices = zip(specs, lines, cut, strict=True)
    return Plan(world_size, tuple(MatrixPlan(spec, *line[:2], cuts) for spec, line, cuts in matrices), count)


class _Partitions:
    """The partitions of a plan, one for all matrices with equal shape, channels and tiles."""

    def __init__(self) -> None:
        # By identity first, which is quick; tiles stay alive through the specs.
        self._by_id: dict[tuple[int, int, bool, int], ChannelPartition] = {}
        self._by_content: dict[bytes, ChannelPartition] = {}

    def of(self, spec: MatrixSpec) -> ChannelPartition:
        """The partition of a matrix, whose cover is checked if it is new."""
        key = (spec.m, spec.n, spec.by_rows, id(spec.tiles))
        if key not in self._by_id:
            check_cover(spec.name, spec.m, spec.n, spec.tiles)
            partition = ChannelPartition(spec.m, spec.n, spec.by_rows, spec.tiles)
            self._by_id[key] = self._by_content.setdefault(partition.digest, partition)
        return self._by_id[key]
