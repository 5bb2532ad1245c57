"""What one rank sends and receives in exchange 2, from a plan. Integers only, and only this rank's view.

Both ends of a message list its parts alike: matrices in the plan's order, in each the segments in channel order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .products import HeldPart, Product, ProductPart, held_as_elements, owned_as_elements

if TYPE_CHECKING:
    from .channels import ChannelPartition
    from .plan import MatrixPlan, Plan


class Replies(NamedTuple):
    """What travels back of owned shared channels, from ``position`` on.

    Where low-rank updates are elements, their ``parts`` follow the scaling factors.
    """

    matrix: int
    position: int
    channels: int
    parts: Sequence[ProductPart] | None = None


class Answered(NamedTuple):
    """What arrives of a share: where it begins, its channels, and what is elements, if low-rank updates are."""

    offset: int
    channels: int
    parts: Sequence[HeldPart] | None


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
        products: for each matrix the low-rank updates that are multiplied here.
        answers: for each matrix with elements among what arrives all that arrives, by share.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        world = plan.world_size
        self.send: list[list[Replies]] = [[] for _ in range(world)]
        self.terms = _common_terms(plan, rank)
        self.send_numbers = [len(places) for places in self.terms]
        self.receive_numbers = list(self.send_numbers)
        incoming: list[list[tuple[int, int, int]]] = [[] for _ in plan.matrices]
        held: dict[int, dict[int, list[HeldPart]]] = {}
        self.products: list[list[Product]] = [[] for _ in plan.matrices]
        for i, matrix in _with_replies(plan):
            held[i] = held_as_elements(matrix, rank)
            for share in held_shares(matrix, rank):
                owner, count = int(matrix.shares.owners[share]), int(matrix.shares.counts[share])
                numbers = _numbers(matrix, count, held[i].get(share))
                incoming[i].append((owner, self.receive_numbers[owner], numbers))
                self.receive_numbers[owner] += numbers
            position = 0
            self.products[i], parts = owned_as_elements(matrix, rank, world)
            for share in np.nonzero(matrix.shares.owners == rank)[0].tolist():
                count = int(matrix.shares.counts[share])
                for holder in matrix.run_of(share).holders.tolist():
                    theirs = parts.get((share, holder))
                    self.send[holder].append(Replies(i, position, count, theirs))
                    self.send_numbers[holder] += _numbers(matrix, count, theirs)
                position += count
        base = np.concatenate(([0], np.cumsum(self.receive_numbers))).tolist()
        self.replies = [[(base[owner] + offset, numbers) for owner, offset, numbers in parts] for parts in incoming]
        self.answers: list[list[Answered]] = [[] for _ in plan.matrices]
        for i, given in ((i, given) for i, given in held.items() if given):
            matrix = plan.matrices[i]
            for share, (offset, _) in zip(held_shares(matrix, rank), self.replies[i], strict=True):
                self.answers[i].append(Answered(offset, int(matrix.shares.counts[share]), given.get(share)))


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
        self.terms = plan.term_places
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


def _numbers(matrix: MatrixPlan, channels: int, parts: Sequence[ProductPart] | Sequence[HeldPart] | None) -> int:
    """How many numbers a share's answer has."""
    spec = matrix.spec
    if parts is None:
        return channels * spec.reply_numbers
    elements = sum((part.last - part.first) * (part.inner[1] - part.inner[0]) for part in parts)
    return channels * int(spec.channel_scales) + elements


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
                i * plan.term_columns + column for i in chosen for column in range(plan.matrices[i].spec.late_terms)
            ]
        found.append(known[key])
    return found
