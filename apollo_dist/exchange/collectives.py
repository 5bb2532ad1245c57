"""The collectives of a step, two for each shard group: the only file with communication in a step.

Exchange 1 carries partial low-rank gradients, or gradient elements where those are fewer, to the owners of their
channels; exchange 2 carries the numbers that owners answer with, and sums of terms, back to the holders. Each is one
collective over the shard group for all matrices together: an ``all_to_all_single``, or for exchange 2 an ``all_reduce``
where that moves less.

In an all-to-all, sums over ranks are taken in rank order, so they are deterministic and equal on every rank that takes
them. In an all-reduce every number is summed once, in one place or along one ring or tree, and then copied to all ranks
(gloo's ring and halving-doubling; NCCL's ring, tree, CollNet and NVLS algorithms), so ranks get equal bits as well.

A rank's own contribution goes through the same buffers; it does not leave the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import device_for, meet
from ..sharding.regions import joined
from .messages import Answer, Partial, Received
from .replies import Answered, Replies, ReplyAllReduce, ReplyRoutes
from .routes import Elements, Projected, ReduceRoutes
from .waiting import wait

if TYPE_CHECKING:
    from ..sharding.local_shard import ShardGroup
    from ..sharding.regions import Range
    from .plan import Plan
    from .products import ProductPart
    from .routes import Channels


class Exchange:
    """The exchange of one plan as one rank of its shard group sees it.

    Args:
        plan: the plan that all ranks agreed on.
        group: the shard group.
        dtype: of the buffers, torch.float32 or torch.float64.
        device: of the buffers.

    Attributes:
        channels: for each matrix the channels this rank deals with.
        bytes_sent: bytes that leave this rank in exchange 1 and exchange 2 of each step; see ``Plan.numbers_sent``.
    """

    def __init__(self, plan: Plan, group: ShardGroup, dtype: torch.dtype, device: torch.device) -> None:
        self.plan, self.group, self.dtype, self.device = plan, group, dtype, device
        self._first = ReduceRoutes(plan, group.rank)
        self.channels = self._first.channels
        first = sum(route.send_numbers for k, route in enumerate(self._first.routes) if k != group.rank)
        second = 0
        if plan.needs_exchange2:
            second = self._plan_exchange2()
        itemsize = torch.empty((), dtype=dtype).element_size()
        self.bytes_sent = (first * itemsize, second * itemsize)

    def _plan_exchange2(self) -> int:
        """Prepare exchange 2; returns how many numbers leave this rank."""
        plan, rank = self.plan, self.group.rank
        if plan.reduces:
            self._second: ReplyRoutes | ReplyAllReduce = ReplyAllReduce(plan, rank)
            self._places = [torch.tensor(self._second.terms, dtype=torch.int64, device=self.device)]
            return plan.ring_numbers
        self._second = ReplyRoutes(plan, rank)
        self.channels = [
            replace(channels, products=tuple(products), multiplied=_multiplied(channels, answers))
            for channels, products, answers in zip(
                self.channels, self._second.products, self._second.answers, strict=True
            )
        ]
        lists = {id(places): places for places in self._second.terms}
        tensors = {key: torch.tensor(places, dtype=torch.int64, device=self.device) for key, places in lists.items()}
        self._places = [tensors[id(places)] for places in self._second.terms]
        return sum(self._second.send_numbers) - self._second.send_numbers[rank]

    def reduce_to_owners(self, partials: Sequence[Partial]) -> list[Received]:
        """Exchange 1: sum partial low-rank gradients at the owners of their channels, and bring elements there.

        Args:
            partials: for each matrix what this rank has of it.

        Returns:
            For each matrix what this rank owns of its shared channels.
        """
        routes = self._first.routes
        send = [route.send_numbers for route in routes]
        receive = [route.receive_numbers for route in routes]
        buffer = torch.empty(sum(send), dtype=self.dtype, device=self.device)
        at = 0
        for route in routes:
            for piece in route.send:
                self._pack(buffer[at : at + piece.numbers], partials[piece.matrix], piece)
                at += piece.numbers
        received = self.all_to_all(buffer, send, receive)
        total = received.new_zeros(self._first.sum_numbers)
        base = [0]
        for route in routes:
            for offset, target, length in route.sums:
                start = base[-1] + offset
                # ``total[...] += `` would copy the sum onto itself.
                total[target : target + length].add_(received[start : start + length])
            base.append(base[-1] + route.receive_numbers)
        return [
            Received(*self._summed(total, i), self._elements(received, base, i)) for i in range(len(self.plan.matrices))
        ]

    def _pack(self, target: Tensor, partial: Partial, piece: Projected | Elements) -> None:
        """Write one piece of a message."""
        if isinstance(piece, Elements):
            if partial.tiles is None:
                target.zero_()
                return
            tile = partial.tiles[piece.tile]
            chosen = slice(piece.first, piece.last)
            part = tile[chosen] if self.plan.matrices[piece.matrix].spec.by_rows else tile[:, chosen]
            target.view(part.shape).copy_(part)
            return
        rows = slice(piece.position, piece.position + piece.channels)
        split = piece.channels * partial.low_rank.shape[1]
        target[:split].view(partial.low_rank[rows].shape).copy_(partial.low_rank[rows])
        if partial.norms is not None:
            target[split:].copy_(partial.norms[rows])

    def _summed(self, total: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """Matrix i's low-rank gradient and squared norms over ``owned_shared``, from the accumulator."""
        spec = self.plan.matrices[i].spec
        rows, norms = [], []
        for offset, count in self._first.owned[i]:
            end = offset + count * spec.rank
            rows.append(total[offset:end].view(count, spec.rank))
            norms.append(total[end : end + count])
        if not rows:
            return total.new_empty((0, spec.rank)), total.new_empty(0) if spec.channel_norms else None
        low_rank = rows[0] if len(rows) == 1 else torch.cat(rows)
        return low_rank, torch.cat(norms) if spec.channel_norms else None

    def _elements(self, received: Tensor, base: list[int], i: int) -> list[tuple[slice, list[Range], Tensor]]:
        """Matrix i's elements that arrived, parts of the same channels side by side."""
        found = []
        by_rows = self.plan.matrices[i].spec.by_rows
        for block in self._first.blocks[i]:
            parts = []
            channels = block.last - block.first
            for (peer, offset), (low, high) in zip(block.places, block.inner, strict=True):
                start, shape = base[peer] + offset, (channels, high - low) if by_rows else (high - low, channels)
                parts.append(received[start : start + channels * (high - low)].view(shape))
            whole = torch.cat(parts, dim=1 if by_rows else 0)
            found.append((slice(block.first, block.last), block.inner, whole if by_rows else whole.t()))
        return found

    def reply_to_holders(
        self, replies: Sequence[Tensor | None], terms: Tensor, products: Mapping[int, Sequence[Tensor]]
    ) -> tuple[list[Tensor | Answer | None], Tensor]:
        """Exchange 2: send what owners answer to the holders, and sum norm terms.

        Args:
            replies: for each matrix with any the numbers of its ``owned_shared`` channels, (channels, numbers).
            terms: (matrices, ``Plan.term_columns``), this rank's terms.
            products: by number of the matrix its ``Channels.products``, (updates, channels, columns) each; none where
                a matrix has no gradient.

        Returns:
            For each such matrix the numbers over ``shared``, (channels, numbers), or an ``Answer`` where some are
            elements; and the terms summed over ranks.
        """
        answers: Sequence[list[Answered]] = [[]] * len(replies)
        if isinstance(self._second, ReplyAllReduce):
            received, total = self._reduce(self._second, replies, terms)
        else:
            received, total = self._scatter(self._second, replies, terms, products)
            answers = self._second.answers
        held: list[Tensor | Answer | None] = []
        for i, (reply, places) in enumerate(zip(replies, self._second.replies, strict=True)):
            if reply is None:
                held.append(None)
            elif answers[i]:
                held.append(self._answer(i, received, answers[i]))
            else:
                parts = [received[offset : offset + numbers] for offset, numbers in places]
                flat = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else reply.new_empty(0)
                held.append(flat.view(-1, reply.shape[1]))
        return held, total

    def _answer(self, i: int, received: Tensor, answers: Sequence[Answered]) -> Answer:
        """Matrix i's numbers and elements in what arrived; elements of neighbouring channels in one tile as one."""
        spec = self.plan.matrices[i].spec
        numbers, scales = [received.new_empty((0, spec.reply_numbers))], [received.new_empty((0, 1))]
        elements: list[tuple[int, int, list[Tensor]]] = []
        position, ends = 0, -1
        for offset, channels, parts in answers:
            factors = channels * int(spec.channel_scales)
            if parts is None:
                numbers.append(received[offset : offset + channels * spec.reply_numbers].view(channels, -1))
                scales.append(numbers[-1][:, :1])
            else:
                scales.append(received[offset : offset + factors].view(-1, 1))
                offset += factors
                for part in parts:
                    shape = spec.low_rank_updates, part.last - part.first, part.inner[1] - part.inner[0]
                    values = received[offset : offset + math.prod(shape)].view(shape)
                    offset += values.numel()
                    if elements and elements[-1][1] == part.tile and ends == position + part.first:
                        elements[-1][2].append(values)
                    else:
                        elements.append((position + part.first, part.tile, [values]))
                    ends = position + part.last
            position += channels
        merged = [(first, tile, torch.cat(each, dim=1) if len(each) > 1 else each[0]) for first, tile, each in elements]
        return Answer(torch.cat(numbers), torch.cat(scales) if spec.channel_scales else None, merged)

    def _parts(
        self, reply: Replies, replies: Sequence[Tensor | None], products: Mapping[int, Sequence[Tensor]]
    ) -> list[Tensor]:
        """One share's answer to one rank, in flat parts."""
        if reply.parts is None:
            return [_part(replies, reply)]
        spec, numbers = self.plan.matrices[reply.matrix].spec, replies[reply.matrix]
        assert numbers is not None
        rows = slice(reply.position, reply.position + reply.channels)
        found = [numbers[rows, 0]] if spec.channel_scales else []
        made = products.get(reply.matrix)
        for part in reply.parts:
            if made is None:
                found.append(numbers.new_zeros(spec.low_rank_updates * _size(part)))
            else:
                begin = self.channels[reply.matrix].products[part.product].inner[0]
                columns = slice(part.inner[0] - begin, part.inner[1] - begin)
                found.append(made[part.product][:, part.first : part.last, columns].reshape(-1))
        return found

    def _scatter(
        self,
        plan: ReplyRoutes,
        replies: Sequence[Tensor | None],
        terms: Tensor,
        products: Mapping[int, Sequence[Tensor]],
    ) -> tuple[Tensor, Tensor]:
        chosen = {id(places): terms.view(-1).index_select(0, places) for places in self._places}
        pieces: list[Tensor] = []
        for places, parts in zip(self._places, plan.send, strict=True):
            pieces.append(chosen[id(places)])
            for part in parts:
                pieces += self._parts(part, replies, products)
        # A rank with nothing to say still takes part.
        buffer = torch.cat(pieces).to(self.dtype)
        received = self.all_to_all(buffer, plan.send_numbers, plan.receive_numbers)
        total = torch.zeros_like(terms)
        at = 0
        for places, numbers in zip(self._places, plan.receive_numbers, strict=True):
            if places.numel():
                total.view(-1).index_add_(0, places, received[at : at + places.numel()])
            at += numbers
        return received, total

    def _reduce(self, plan: ReplyAllReduce, replies: Sequence[Tensor | None], terms: Tensor) -> tuple[Tensor, Tensor]:
        (places,) = self._places
        block = torch.zeros(self.plan.reduced_numbers, dtype=self.dtype, device=self.device)
        for part, offset in plan.owned:
            numbers = _part(replies, part)
            block[offset : offset + numbers.numel()].copy_(numbers)
        first_term = block.numel() - places.numel()
        torch.index_select(terms.view(-1), 0, places, out=block[first_term:])
        where = device_for(self.group.process_group, self.device)
        summed = block.to(where)
        meet()
        wait(dist.all_reduce(summed, group=self.group.process_group, async_op=True), where)
        summed = summed.to(self.device)
        total = terms.clone()  # what one rank alone has is complete
        total.view(-1)[places] = summed[first_term:]
        return summed, total

    def all_to_all(self, buffer: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send numbers to each rank, and return what each sends here, (sum of ``receive``,); a collective."""
        assert buffer.numel() == sum(send), "the plan and the pieces disagree"
        where = device_for(self.group.process_group, self.device)
        received = torch.empty(sum(receive), dtype=buffer.dtype, device=where)
        given = buffer.to(where)
        meet()
        work = dist.all_to_all_single(received, given, receive, send, group=self.group.process_group, async_op=True)
        wait(work, where)
        return received.to(self.device)


def _multiplied(channels: Channels, answers: Sequence[Answered]) -> tuple[Range, ...] | None:
    """Positions in ``held`` of the channels whose low-rank update this rank multiplies; None for all."""
    if not answers:
        return None
    at = channels.local_only.count
    found = [(0, at)] if at else []
    for _, count, parts in answers:
        if parts is None:
            found.append((at, at + count))
        at += count
    return joined(found)


def _size(part: ProductPart) -> int:
    return (part.last - part.first) * (part.inner[1] - part.inner[0])


def _part(replies: Sequence[Tensor | None], part: Replies) -> Tensor:
    reply = replies[part.matrix]
    assert reply is not None
    return reply[part.position : part.position + part.channels].reshape(-1)


def first_rank_where(condition: Tensor, process_group: dist.ProcessGroup | None = None) -> int | None:
    """The first rank of the group on which a bool scalar is true, None if there is none; the same on every rank.

    A collective of one number, which waits for the device.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0 if bool(condition) else None
    size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    first = torch.where(condition, rank, size).to(device_for(process_group, condition.device))
    meet()
    wait(dist.all_reduce(first, op=dist.ReduceOp.MIN, group=process_group, async_op=True), first.device)
    found = int(first)
    return None if found == size else found
