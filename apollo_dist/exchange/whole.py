"""Whole matrices at one owner: who that is, what travels there and back, in which rounds.

Some work needs a whole matrix: an SVD, or Newton-Schulz iterations. One of the ranks that hold parts of it is its
owner: the others send it their elements, and get back theirs of the result (``scatter``), or all of a smaller result
(``share``). Owners are chosen so that each has about the same arithmetic to do; a matrix that one rank holds alone is
its own, and does not travel. Matrices are taken in rounds, so that what an owner has in memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .channels import Integers
    from .collectives import Exchange
    from .plan import MatrixPlan, Plan

BFLOAT16 = 2  # bytes
# How many elements of whole matrices an owner has in one round, at least one matrix: 256 MiB of float32.
ROUND = 1 << 26

Place = tuple[int, int, int, int, int]  # tile number, channels start .. stop, inner start .. stop


def owners_of(plan: Plan) -> dict[int, int]:
    """The owner of each matrix that is needed whole, by its number; the same on every rank.

    The largest are given first, each to the rank among its holders that has least to do: m n min(m, n) for a matrix.
    """
    chosen = [i for i, m in enumerate(plan.matrices) if m.spec.whole or m.spec.shared_state]
    load = [0] * plan.world_size
    found = {}
    for i in sorted(chosen, key=lambda i: (-_work(plan.matrices[i]), i)):
        owner = min(plan.matrices[i].participants.tolist(), key=lambda rank: (load[rank], rank))
        load[owner] += _work(plan.matrices[i])
        found[i] = owner
    return dict(sorted(found.items()))


def _work(matrix: MatrixPlan) -> int:
    m, n = matrix.spec.m, matrix.spec.n
    return m * n * min(m, n)


class WholeTraffic(NamedTuple):
    """What whole matrices cost, besides exchanges 1 and 2.

    Attributes:
        sent: how many bytes leave each rank in each step.
        collectives: of each step.
        refresh_sent: how many bytes leave each rank when all stored projections are refreshed.
        largest: how many bytes of whole matrices each rank owns in one round, at most.
    """

    sent: Integers
    collectives: int
    refresh_sent: Integers
    largest: Integers


def traffic(plan: Plan, itemsize: int) -> WholeTraffic:
    """What whole matrices cost under a plan, where a number that does not travel in bfloat16 has so many bytes."""
    sent, refresh = np.zeros(plan.world_size, dtype=np.int64), np.zeros(plan.world_size, dtype=np.int64)
    owners = owners_of(plan)
    sizes = {i: BFLOAT16 if plan.matrices[i].spec.whole_in_bfloat16 else itemsize for i in owners}
    for i, owner in owners.items():
        matrix, size = plan.matrices[i], sizes[i]
        elements = matrix.partition.elements(plan.world_size)
        from_others = int(elements.sum() - elements[owner])
        elements[owner] = 0
        if matrix.spec.whole:
            sent += elements * size
            sent[owner] += from_others * size
        else:
            refresh += elements * size
            made = matrix.spec.shared_state * (BFLOAT16 if matrix.spec.shared_in_bfloat16 else itemsize)
            refresh[owner] += (len(matrix.participants) - 1) * made
    rounds = rounds_of(plan, owners, [i for i in owners if plan.matrices[i].spec.whole])
    largest = np.zeros(plan.world_size, dtype=np.int64)
    for chosen in rounds_of(plan, owners, owners):
        owned = np.zeros(plan.world_size, dtype=np.int64)
        for i in chosen:
            owned[owners[i]] += plan.matrices[i].spec.m * plan.matrices[i].spec.n * sizes[i]
        largest = np.maximum(largest, owned)
    return WholeTraffic(sent, 2 * sum(travels(plan, chosen) for chosen in rounds), refresh, largest)


def travels(plan: Plan, chosen: Iterable[int]) -> bool:
    """Whether any of some matrices has several holders; the same on every rank."""
    return any(len(plan.matrices[i].participants) > 1 for i in chosen)


def rounds_of(plan: Plan, owners: Mapping[int, int], chosen: Iterable[int]) -> list[list[int]]:
    """Divide matrices so that in each round each owner has one dtype, and at most ``ROUND`` elements, or one matrix."""
    by_dtypes: dict[tuple[bool, bool], list[int]] = {}
    for i in chosen:
        spec = plan.matrices[i].spec
        by_dtypes.setdefault((spec.whole_in_bfloat16, spec.shared_in_bfloat16), []).append(i)
    return [part for alike in by_dtypes.values() for part in _rounds_of(plan, owners, alike)]


def _rounds_of(plan: Plan, owners: Mapping[int, int], chosen: Iterable[int]) -> list[list[int]]:
    chunks: list[list[list[int]]] = [[] for _ in range(plan.world_size)]
    room = [0] * plan.world_size
    for i in chosen:
        owner, spec = owners[i], plan.matrices[i].spec
        size = spec.m * spec.n
        if size > room[owner]:
            chunks[owner].append([])
            room[owner] = ROUND
        chunks[owner][-1].append(i)
        room[owner] -= size
    return [sorted(i for part in parts for i in part) for parts in zip_longest(*chunks, fillvalue=())]


class WholeExchange:
    """The exchange of whole matrices of one plan, as one rank of its shard group sees it.

    Args:
        exchange: of the same plan.

    Attributes:
        owners: by number of the matrix, of all that are needed whole.
        bytes_sent: that leave this rank in each step, and when all stored projections are refreshed.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._plan, self._rank = exchange, exchange.plan, exchange.group.rank
        self.owners = owners_of(self._plan)
        cost = traffic(self._plan, exchange.dtype.itemsize)
        self.bytes_sent = int(cost.sent[self._rank]), int(cost.refresh_sent[self._rank])
        self._known: dict[tuple[int, int], list[Place]] = {}

    def rounds(self, chosen: Iterable[int]) -> list[list[int]]:
        """Divide matrices into rounds."""
        return rounds_of(self._plan, self.owners, chosen)

    def gather(self, chosen: Sequence[int], tiles: Mapping[int, Sequence[Tensor] | None]) -> dict[int, Tensor]:
        """Bring the elements of matrices to their owners.

        Args:
            chosen: the matrices of one round.
            tiles: of each that this rank holds a part of, its tiles, channels first, in any dtype; None for zeros.

        Returns:
            The matrices that this rank owns, channels first, (channels, inner), in the dtype of the exchange or, where
            that is declared, in bfloat16.
        """
        dtype = self._dtype(chosen)
        local = {i: given[0].to(dtype) for i in chosen if (given := tiles.get(i)) and self._alone(i)}
        chosen = [i for i in chosen if i not in local]
        send: list[list[tuple[Place, Tensor | None]]] = [[] for _ in range(self._plan.world_size)]
        for i in chosen:
            given = tiles.get(i)
            send[self.owners[i]] += [(p, None if given is None else given[p[0]]) for p in self._places(i, self._rank)]
        whole = {i: self._new(i) for i in chosen if self.owners[i] == self._rank}
        receive = [
            [(p, whole[i]) for i in chosen if i in whole for p in self._places(i, peer)]
            for peer in range(self._plan.world_size)
        ]
        self._exchange_parts(
            chosen,
            [[(_size(p), part) for p, part in parts] for parts in send],
            [[(_size(p), matrix[p[1] : p[2], p[3] : p[4]]) for p, matrix in parts] for parts in receive],
            dtype,
        )
        return {**local, **whole}

    def scatter(self, chosen: Sequence[int], whole: Mapping[int, Tensor]) -> dict[int, list[Tensor]]:
        """Bring elements of matrices from their owners to the ranks that hold them.

        Args:
            chosen: the matrices of one round.
            whole: those that this rank owns, (channels, inner), in any dtype.

        Returns:
            Of each that this rank holds a part of its tiles, channels first, rounded as ``gather`` rounds.
        """
        dtype = self._dtype(chosen)
        whole = {i: matrix.to(dtype) for i, matrix in whole.items()}
        local = {i: [matrix] for i, matrix in whole.items() if self._alone(i)}
        chosen = [i for i in chosen if i not in local]
        send = [
            [
                (_size(p), whole[i][p[1] : p[2], p[3] : p[4]])
                for i in chosen
                if self.owners[i] == self._rank
                for p in self._places(i, peer)
            ]
            for peer in range(self._plan.world_size)
        ]
        found: dict[int, list[Tensor]] = {}
        receive: list[list[tuple[int, Tensor]]] = [[] for _ in range(self._plan.world_size)]
        for i in chosen:
            places = self._places(i, self._rank)
            if places:
                found[i] = [self._empty((0, 0), dtype)] * (max(p[0] for p in places) + 1)
            for p in places:
                found[i][p[0]] = self._empty((p[2] - p[1], p[4] - p[3]), dtype)
                receive[self.owners[i]].append((_size(p), found[i][p[0]]))
        self._exchange_parts(chosen, send, receive, dtype)
        return {**local, **found}

    def share(self, chosen: Sequence[int], made: Mapping[int, Tensor], out: Mapping[int, Tensor]) -> None:
        """Bring what owners made of matrices to all ranks that hold parts of them.

        Args:
            chosen: the matrices of one round.
            made: of those that this rank owns.
            out: of those that it holds a part of, tensors of the same shapes, which are written.
        """
        send: list[list[tuple[int, Tensor]]] = [[] for _ in range(self._plan.world_size)]
        receive: list[list[tuple[int, Tensor]]] = [[] for _ in range(self._plan.world_size)]
        for i in chosen:
            participants = self._plan.matrices[i].participants.tolist()
            if self.owners[i] == self._rank:
                for peer in participants:
                    send[peer].append((made[i].numel(), made[i]))
            if self._rank in participants:
                receive[self.owners[i]].append((out[i].numel(), out[i]))
        half = any(self._plan.matrices[i].spec.shared_in_bfloat16 for i in chosen)
        self._exchange_parts(chosen, send, receive, torch.bfloat16 if half else self._exchange.dtype)

    def _exchange_parts(
        self,
        chosen: Sequence[int],
        send: Sequence[Sequence[tuple[int, Tensor | None]]],
        receive: Sequence[Sequence[tuple[int, Tensor]]],
        dtype: torch.dtype,
    ) -> None:
        """Send parts to each rank (None: zeros), and write what comes from each; a collective if anything can travel.

        A rank's own parts are copied.
        """
        for (_, part), (_, target) in zip(send[self._rank], receive[self._rank], strict=True):
            target.zero_() if part is None else target.copy_(part)
        if not travels(self._plan, chosen):
            return
        others = [peer for peer in range(self._plan.world_size) if peer != self._rank]
        counts = [sum(size for size, _ in parts) if k in others else 0 for k, parts in enumerate(send)]
        expected = [sum(size for size, _ in parts) if k in others else 0 for k, parts in enumerate(receive)]
        buffer = self._empty((sum(counts),), dtype)
        at = 0
        for peer in others:
            for size, part in send[peer]:
                target = buffer[at : at + size]
                target.zero_() if part is None else target.view(part.shape).copy_(part)
                at += size
        received = self._exchange.all_to_all(buffer, counts, expected)
        at = 0
        for peer in others:
            for size, target in receive[peer]:
                target.copy_(received[at : at + size].view(target.shape))
                at += size

    def _alone(self, i: int) -> bool:
        """Whether all of a matrix is one tile of its owner, which then need not be copied."""
        return len(self._plan.matrices[i].partition.rank) == 1

    def _places(self, i: int, rank: int) -> list[Place]:
        """Where a rank's tiles of a matrix are."""
        if (i, rank) not in self._known:
            p = self._plan.matrices[i].partition
            mine = p.tiles_of(rank)
            edges = (p.number, p.start, p.stop, p.inner_start, p.inner_stop)
            self._known[i, rank] = list(zip(*(values[mine].tolist() for values in edges), strict=True))
        return self._known[i, rank]

    def _dtype(self, chosen: Sequence[int]) -> torch.dtype:
        """What the matrices of one round travel in."""
        half = any(self._plan.matrices[i].spec.whole_in_bfloat16 for i in chosen)
        return torch.bfloat16 if half else self._exchange.dtype

    def _new(self, i: int) -> Tensor:
        spec = self._plan.matrices[i].spec
        return self._empty((spec.m, spec.n) if spec.by_rows else (spec.n, spec.m), self._dtype([i]))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._exchange.device)


def _size(place: Place) -> int:
    return (place[2] - place[1]) * (place[4] - place[3])
