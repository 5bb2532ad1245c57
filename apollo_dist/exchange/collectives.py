"""The collectives of a step, for each shard group two or three: the only file with communication in a step.

Exchange 1 carries partial low-rank gradients, or gradient elements where those are fewer, to the owners of their
channels; exchange 2 carries the numbers that owners answer with, and sums of terms, back to the holders. Each is one
collective over the shard group for all matrices together: an ``all_to_all_single``, or for exchange 2 an ``all_reduce``
where that moves less. Terms on which the answers depend are summed before exchange 2, in an all-reduce of a number or
two a matrix. An exchange 1 of more than 64 MB a rank takes several, of which two are under way at a time: one travels,
on accelerators on a stream of its own, while the next one is projected (``buckets.py``).

In an all-to-all, sums over ranks are taken in rank order, so they are deterministic and equal on every rank that takes
them. In an all-reduce every number is summed once, in one place or along one ring or tree, and then copied to all ranks
(gloo's ring and halving-doubling; NCCL's ring, tree, CollNet and NVLS algorithms), so ranks get equal bits as well.

A rank's own contribution goes through the same buffers; it does not leave the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import device_for, meet
from ..kernels.reference import add_up
from ..sharding.regions import joined
from .messages import Answer, Partial, Received
from .packing import Arrivals, packed
from .replies import Answered, Replies, ReplyAllReduce, ReplyRoutes
from .routes import ReduceRoutes
from .waiting import wait

if TYPE_CHECKING:
    from ..sharding.local_shard import ShardGroup
    from ..sharding.regions import Range
    from .plan import Plan
    from .products import ProductPart
    from .routes import Channels


class Sent(NamedTuple):
    """An all-to-all under way: its work, and the tensors that it reads and writes, which have to stay."""

    work: Any
    given: Tensor
    received: Tensor


class Exchange:
    """The exchange of one plan as one rank of its shard group sees it.

    Args:
        plan: the plan that all ranks agreed on.
        group: the shard group.
        dtype: of the buffers, torch.float32 or torch.float64.
        device: of the buffers.

    Attributes:
        add_up: how parts of all ranks are summed, as ``kernels.reference.add_up``; in fp32 a kernel may take its place.
        channels: for each matrix the channels this rank deals with.
        bytes_sent: bytes that leave this rank in exchange 1, and after it, in each step; see ``Plan.numbers_sent``.
    """

    def __init__(self, plan: Plan, group: ShardGroup, dtype: torch.dtype, device: torch.device) -> None:
        self.plan, self.group, self.dtype, self.device = plan, group, dtype, device
        self._first = ReduceRoutes(plan, group.rank)
        self.add_up: Callable[[Tensor, Tensor], None] = add_up
        self.channels = self._first.channels
        routes = (route for bucket in self._first.routes for k, route in enumerate(bucket) if k != group.rank)
        first = sum(route.send_numbers for route in routes)
        second = plan.first_term_numbers
        if plan.needs_exchange2:
            second += self._plan_exchange2()
        self._first_places = torch.tensor(plan.first_term_places, dtype=torch.int64, device=device)
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

    def sending(self, bucket: int) -> list[int]:
        """The matrices of which this rank sends anything in a bucket of exchange 1."""
        return self._first.sending[bucket]

    def reduce_to_owners(self, partials: Callable[[int], Mapping[int, Partial]]) -> list[Received]:
        """Exchange 1: sum partial low-rank gradients at the owners of their channels, and bring elements there.

        Args:
            partials: makes, by number of the matrix, what this rank has for a bucket; called for each in order.

        Returns:
            For each matrix what this rank owns of its shared channels.
        """
        arrivals = Arrivals(self.plan, self._first, self.add_up, self.dtype, self.device)
        under_way: deque[Sent] = deque()
        for bucket, routes in enumerate(self._first.routes):
            buffer = packed(self.plan, routes, partials(bucket), self.dtype, self.device)
            send = [route.send_numbers for route in routes]
            under_way.append(self.begin_all_to_all(buffer, send, [route.receive_numbers for route in routes]))
            del buffer
            if bucket:
                arrivals.take(self.end_all_to_all(under_way.popleft()))
        arrivals.take(self.end_all_to_all(under_way.popleft()))
        return [arrivals.of(i) for i in range(len(self.plan.matrices))]

    def sum_first_terms(self, terms: Tensor) -> Tensor:
        """Sum the terms on which answers depend over ranks; a collective, if there are any.

        Args:
            terms: (matrices, ``Plan.term_columns``), this rank's terms.

        Returns:
            The same with those terms summed.
        """
        if not self.plan.first_term_places:
            return terms
        summed = self._all_reduce(terms.view(-1).index_select(0, self._first_places).to(self.dtype))
        total = terms.clone()
        total.view(-1)[self._first_places] = summed.to(terms.dtype)
        return total

    def reply_to_holders(
        self, replies: Sequence[Tensor | None], terms: Tensor, products: Mapping[int, Sequence[Tensor]]
    ) -> tuple[list[Tensor | Answer | None], Tensor]:
        """Exchange 2: send what owners answer to the holders, and sum norm terms.

        Args:
            replies: for each matrix with any the numbers of its ``owned_shared`` channels, (channels, numbers).
            terms: (matrices, ``Plan.term_columns``), this rank's terms.
            products: by number of the matrix its ``Channels.products``, (channels, columns) each; none where a matrix
                has no gradient.

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
                    shape = part.last - part.first, part.inner[1] - part.inner[0]
                    values = received[offset : offset + math.prod(shape)].view(shape)
                    offset += values.numel()
                    if elements and elements[-1][1] == part.tile and ends == position + part.first:
                        elements[-1][2].append(values)
                    else:
                        elements.append((position + part.first, part.tile, [values]))
                    ends = position + part.last
            position += channels
        merged = [(first, tile, torch.cat(each) if len(each) > 1 else each[0]) for first, tile, each in elements]
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
                found.append(numbers.new_zeros(_size(part)))
            else:
                begin = self.channels[reply.matrix].products[part.product].inner[0]
                columns = slice(part.inner[0] - begin, part.inner[1] - begin)
                found.append(made[part.product][part.first : part.last, columns].reshape(-1))
        return found

    def _scatter(
        self,
        plan: ReplyRoutes,
        replies: Sequence[Tensor | None],
        terms: Tensor,
        products: Mapping[int, Sequence[Tensor]],
    ) -> tuple[Tensor, Tensor]:
        distinct = {id(places): places for places in self._places}
        chosen = {key: terms.view(-1).index_select(0, places) for key, places in distinct.items()}
        pieces: list[Tensor] = []
        for places, parts in zip(self._places, plan.send, strict=True):
            pieces.append(chosen[id(places)])
            for part in parts:
                pieces += self._parts(part, replies, products)
        # A rank with nothing to say still takes part.
        buffer = torch.cat(pieces).to(self.dtype)
        received = self.all_to_all(buffer, plan.send_numbers, plan.receive_numbers)
        total = torch.zeros_like(terms)
        starts = list(accumulate(plan.receive_numbers, initial=0))[:-1]
        theirs = [received[at : at + places.numel()] for at, places in zip(starts, self._places, strict=True)]
        if len(distinct) == 1:  # all ranks have a part in the same matrices
            summed = torch.empty_like(theirs[0])
            self.add_up(torch.stack(theirs), summed)
            total.view(-1).index_copy_(0, self._places[0], summed)
            return received, total
        for places, numbers in zip(self._places, theirs, strict=True):
            if places.numel():
                total.view(-1).index_add_(0, places, numbers)
        return received, total

    def _reduce(self, plan: ReplyAllReduce, replies: Sequence[Tensor | None], terms: Tensor) -> tuple[Tensor, Tensor]:
        (places,) = self._places
        block = torch.zeros(self.plan.reduced_numbers, dtype=self.dtype, device=self.device)
        for part, offset in plan.owned:
            numbers = _part(replies, part)
            block[offset : offset + numbers.numel()].copy_(numbers)
        first_term = block.numel() - places.numel()
        torch.index_select(terms.view(-1), 0, places, out=block[first_term:])
        summed = self._all_reduce(block)
        total = terms.clone()  # what one rank alone has is complete
        total.view(-1)[places] = summed[first_term:]
        return summed, total

    def _all_reduce(self, block: Tensor) -> Tensor:
        where = device_for(self.group.process_group, self.device)
        summed = block.to(where)
        meet()
        wait(dist.all_reduce(summed, group=self.group.process_group, async_op=True), where)
        return summed.to(self.device)

    def all_to_all(self, buffer: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send numbers to each rank, and return what each sends here, (sum of ``receive``,); a collective."""
        return self.end_all_to_all(self.begin_all_to_all(buffer, send, receive))

    def begin_all_to_all(self, buffer: Tensor, send: list[int], receive: list[int]) -> Sent:
        """Start what ``all_to_all`` does; every rank ends those that it starts, in order."""
        assert buffer.numel() == sum(send), "the plan and the pieces disagree"
        where = device_for(self.group.process_group, self.device)
        received = torch.empty(sum(receive), dtype=buffer.dtype, device=where)
        given = buffer.to(where)
        meet()
        work = dist.all_to_all_single(received, given, receive, send, group=self.group.process_group, async_op=True)
        return Sent(work, given, received)

    def end_all_to_all(self, sent: Sent) -> Tensor:
        """Wait for what was started; on accelerators only the current stream waits."""
        wait(sent.work, sent.received.device)
        return sent.received.to(self.device)


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
