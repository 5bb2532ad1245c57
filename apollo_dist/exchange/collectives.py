"""The collectives of a step, two for each unit: the only file with communication in a step.

Exchange 1 carries partial low-rank gradients to the owners of their channels, exchange 2 carries scaling factors and
norm terms back to the holders. Both are one ``all_to_all_single`` over the shard group for all matrices together, and
sums over ranks are taken in rank order, so they are deterministic and equal on every rank that takes them.

A rank's own contribution goes through the same buffers; it does not leave the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout.holding import ShardGroup
from .plan import ChannelSet, MatrixPlan, Plan, merged

# A slice of one matrix's channels: (matrix, position in its channel set, count).
Piece = tuple[int, int, int]

TERMS = 3


@dataclass(frozen=True)
class Channels:
    """Which channels of one matrix this rank deals with.

    Attributes:
        alone: held by this rank only, and so owned by it.
        shared_held: held by this rank and others.
        shared_owned: those of ``shared_held`` that this rank owns.
    """

    alone: ChannelSet
    shared_held: ChannelSet
    shared_owned: ChannelSet

    @staticmethod
    def of(matrix: MatrixPlan, rank: int) -> Channels:
        """The channels that ``rank`` deals with."""
        held = [s for s in matrix.segments if rank in s.holders]
        return Channels(
            merged([s for s in held if not s.shared]),
            merged([s for s in held if s.shared]),
            merged([s for s in held if s.shared and s.owner == rank]),
        )

    @property
    def owned(self) -> ChannelSet:
        """The channels whose low-rank state lives here, in the order it is stored: ``alone``, then shared ones."""
        return self.alone + self.shared_owned

    @property
    def held(self) -> ChannelSet:
        """The channels this rank holds any element of: ``alone``, then ``shared_held``."""
        return self.alone + self.shared_held


@dataclass
class _Route:
    """What travels between this rank and one other."""

    send: list[Piece] = field(default_factory=list)
    send_numbers: int = 0
    receive_numbers: int = 0
    # Exchange 1: (offset in this rank's receive buffer, offset in the accumulator, length).
    sums: list[tuple[int, int, int]] = field(default_factory=list)


class Exchange:
    """The exchange of one plan as one rank of its shard group sees it.

    Args:
        plan: the plan that all ranks agreed on.
        group: the shard group.
        dtype: of the buffers, torch.float32 or torch.float64.
        device: of the buffers.

    Attributes:
        channels: for each matrix the channels this rank deals with.
        bytes_sent: bytes that leave this rank in exchange 1 and exchange 2 of each step.
    """

    def __init__(self, plan: Plan, group: ShardGroup, dtype: torch.dtype, device: torch.device) -> None:
        self.plan, self.group, self.dtype, self.device = plan, group, dtype, device
        self.channels = [Channels.of(m, group.rank) for m in plan.matrices]
        first, second = plan.numbers_sent(group.rank)
        itemsize = torch.empty((), dtype=dtype).element_size()
        self.bytes_sent = (first * itemsize, second * itemsize)
        if plan.needs_exchange1:
            self._plan_exchange1()
        if plan.needs_exchange2:
            self._plan_exchange2()

    def to_owners(self, partials: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor | None]]:
        """Exchange 1: sum partial low-rank gradients at the owners of their channels.

        Args:
            partials: for each matrix this rank's partial low-rank gradient over ``shared_held``, (channels, r), and
                the partial squared channel norms of the gradient, (channels,), where the plan asks for them.

        Returns:
            The same pair for each matrix, complete, over ``shared_owned``.
        """
        rank = self.group.rank
        pieces: list[Tensor] = []
        for route in self._first:
            for i, position, count in route.send:
                low_rank, norms = partials[i]
                pieces.append(low_rank[position : position + count].reshape(-1))
                if norms is not None:
                    pieces.append(norms[position : position + count])
        received = self._all_to_all(pieces, self._first)
        total = received.new_zeros(self._sum_numbers)
        at = 0
        for route in self._first:
            for offset, target, length in route.sums:
                total[target : target + length] += received[at + offset : at + offset + length]
            at += route.receive_numbers
        assert at == received.numel() and rank < len(self._first)
        return [self._owned(total, i) for i in range(len(self.plan.matrices))]

    def to_holders(self, scales: Sequence[Tensor | None], terms: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Exchange 2: send scaling factors to the holders, and sum norm terms.

        Args:
            scales: for each matrix with channel scaling the factors of its ``shared_owned`` channels, (channels,).
            terms: (matrices, TERMS), this rank's norm terms.

        Returns:
            The factors over ``shared_held`` for each matrix with channel scaling, and the terms summed over ranks.
        """
        pieces: list[Tensor] = []
        for route, chosen in zip(self._second, self._terms_sent, strict=True):
            pieces.append(terms.view(-1).index_select(0, chosen))
            for i, position, count in route.send:
                scale = scales[i]
                assert scale is not None
                pieces.append(scale[position : position + count])
        received = self._all_to_all(pieces, self._second)
        total = torch.zeros_like(terms)
        at = 0
        for route, chosen in zip(self._second, self._terms_sent, strict=True):
            total.view(-1).index_add_(0, chosen, received[at : at + chosen.numel()])
            at += route.receive_numbers
        held: list[Tensor | None] = []
        for i, scale in enumerate(scales):
            if scale is None:
                held.append(None)
            else:
                parts = [received[offset : offset + count] for offset, count in self._scale_parts[i]]
                held.append(torch.cat(parts) if parts else scale.new_empty(0))
        return held, total

    def _all_to_all(self, pieces: list[Tensor], routes: Sequence[_Route]) -> Tensor:
        send = [r.send_numbers for r in routes]
        receive = [r.receive_numbers for r in routes]
        # A rank with nothing to say still takes part.
        buffer = torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype, device=self.device)
        buffer = buffer.to(self.dtype)
        assert buffer.numel() == sum(send), "the plan and the pieces disagree"
        where = device_for(self.group.process_group, self.device)
        received = torch.empty(sum(receive), dtype=self.dtype, device=where)
        dist.all_to_all_single(received, buffer.to(where), receive, send, group=self.group.process_group)
        return received.to(self.device)

    def _plan_exchange1(self) -> None:
        me = self.group.rank
        self._first = [_Route() for _ in range(self.group.size)]
        self._owned_blocks: list[list[tuple[int, int]]] = [[] for _ in self.plan.matrices]
        self._sum_numbers = 0
        for i, matrix in enumerate(self.plan.matrices):
            width = matrix.spec.numbers_per_channel
            position = 0
            for s in matrix.segments:
                if not s.shared or me not in s.holders:
                    continue
                self._first[s.owner].send.append((i, position, s.count))
                self._first[s.owner].send_numbers += s.count * width
                position += s.count
                if s.owner != me:
                    continue
                for holder in s.holders:
                    _append_run(self._first[holder], self._sum_numbers, s.count * width)
                self._owned_blocks[i].append((self._sum_numbers, s.count))
                self._sum_numbers += s.count * width

    def _owned(self, total: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """Matrix i's low-rank gradient and squared norms over ``shared_owned``, from the accumulator."""
        spec = self.plan.matrices[i].spec
        rows, norms = [], []
        for offset, count in self._owned_blocks[i]:
            end = offset + count * spec.rank
            rows.append(total[offset:end].view(count, spec.rank))
            norms.append(total[end : end + count])
        if not rows:
            return total.new_empty((0, spec.rank)), total.new_empty(0) if spec.channel_norms else None
        low_rank = rows[0] if len(rows) == 1 else torch.cat(rows)
        return low_rank, torch.cat(norms) if spec.channel_norms else None

    def _plan_exchange2(self) -> None:
        me = self.group.rank
        self._second = [_Route() for _ in range(self.group.size)]
        chosen: list[list[int]] = [[] for _ in range(self.group.size)]
        for i, matrix in enumerate(self.plan.matrices):
            if me in matrix.participants:
                for peer in matrix.participants:
                    chosen[peer] += [i * TERMS + column for column in matrix.spec.terms]
        self._terms_sent = [torch.tensor(c, dtype=torch.int64, device=self.device) for c in chosen]
        for route, c in zip(self._second, chosen, strict=True):
            route.send_numbers = route.receive_numbers = len(c)
        incoming: list[list[tuple[int, int, int]]] = []
        for i, matrix in enumerate(self.plan.matrices):
            incoming.append([])
            position = 0
            for s in matrix.segments:
                if not (s.shared and matrix.spec.channel_scales and me in s.holders):
                    continue
                incoming[i].append((s.owner, self._second[s.owner].receive_numbers, s.count))
                self._second[s.owner].receive_numbers += s.count
                if s.owner == me:
                    for holder in s.holders:
                        self._second[holder].send.append((i, position, s.count))
                        self._second[holder].send_numbers += s.count
                    position += s.count
        base = [0]
        for route in self._second:
            base.append(base[-1] + route.receive_numbers)
        self._scale_parts = [[(base[owner] + offset, count) for owner, offset, count in parts] for parts in incoming]


def device_for(process_group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where a tensor on ``device`` has to be for a collective: NCCL cannot reach states offloaded to the CPU."""
    backends = dist.get_backend_config(process_group)
    if f"{device.type}:" in backends or ":" not in backends:
        return device
    return torch.accelerator.current_accelerator() or device


def first_rank_where(condition: Tensor, process_group: dist.ProcessGroup | None = None) -> int | None:
    """The first rank of the group on which a bool scalar is true, None if there is none; the same on every rank.

    A collective of one number, which waits for the device.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0 if bool(condition) else None
    size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    first = torch.where(condition, rank, size).to(device_for(process_group, condition.device))
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=process_group)
    found = int(first)
    return None if found == size else found


def _append_run(route: _Route, target: int, length: int) -> None:
    """Note that the next ``length`` numbers from this peer add to the accumulator at ``target``; merge neighbours."""
    offset = route.receive_numbers
    route.receive_numbers += length
    if route.sums:
        last_offset, last_target, last_length = route.sums[-1]
        if last_offset + last_length == offset and last_target + last_length == target:
            route.sums[-1] = (last_offset, last_target, last_length + length)
            return
    route.sums.append((offset, target, length))
