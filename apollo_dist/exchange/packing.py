"""What a rank has for exchange 1 into a message, and out of what arrives: all of the exchange but its collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .messages import Elements, Operand, Partial, Projected, Received

if TYPE_CHECKING:
    from .plan import Plan
    from .routes import Place, ReduceRoutes, Route


def packed(
    plan: Plan, routes: Sequence[Route], partials: Mapping[int, Partial], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The messages of a bucket, one after the other; neighbouring projected parts are copied in one go.

    Args:
        plan: of the exchange.
        routes: of the bucket, by rank.
        partials: by number of the matrix what this rank has.
        dtype, device: of the messages.
    """
    buffer = torch.empty(sum(route.send_numbers for route in routes), dtype=dtype, device=device)
    parts: list[Tensor] = []
    at = start = 0
    for piece in (piece for route in routes for piece in route.send):
        partial = partials[piece.matrix]
        if isinstance(piece, Projected):
            rows = slice(piece.position, piece.position + piece.channels)
            parts += [part[rows].reshape(-1) for part in partial[:2] if part is not None]
        else:
            _copy(parts, buffer[start:at])
            _pack(buffer[at : at + piece.numbers], partial, piece, plan.matrices[piece.matrix].spec.by_rows)
            parts, start = [], at + piece.numbers
        at += piece.numbers
    _copy(parts, buffer[start:at])
    return buffer


def _copy(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write 1-D tensors one after the other."""
    if parts:
        torch.cat(list(parts), out=out)


def _pack(target: Tensor, partial: Partial, piece: Elements, by_rows: bool) -> None:
    """Write gradient elements into a message."""
    if partial.tiles is None:
        target.zero_()
        return
    chosen = slice(piece.first, piece.last)
    part = partial.tiles[piece.tile][chosen] if by_rows else partial.tiles[piece.tile][:, chosen]
    target.view(part.shape).copy_(part)


class Arrivals:
    """What exchange 1 brings in one step.

    Args:
        plan: of the exchange.
        routes: of this rank.
        add_up: sums parts of all ranks, as ``kernels.reference.add_up``.
        dtype, device: of what arrives.
    """

    def __init__(
        self,
        plan: Plan,
        routes: ReduceRoutes,
        add_up: Callable[[Tensor, Tensor], None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._plan, self._routes, self._add_up = plan, routes, add_up
        self._totals: list[Tensor] = []  # by bucket, sums of projected parts
        self._elements = [self._operands(i, dtype, device) for i in range(len(plan.matrices))]

    def _operands(self, i: int, dtype: torch.dtype, device: torch.device) -> list[Operand]:
        """Memory for matrix i's elements that arrive, parts of the same channels side by side."""
        found = []
        for block in self._routes.blocks[i]:
            shape = block.last - block.first, sum(high - low for low, high in block.inner)
            by_rows = self._plan.matrices[i].spec.by_rows
            whole = torch.empty(shape if by_rows else shape[::-1], dtype=dtype, device=device)
            found.append((slice(block.first, block.last), block.inner, whole if by_rows else whole.t()))
        return found

    def take(self, received: Tensor) -> None:
        """Take the next bucket: sum projected parts in rank order, and bring elements where they belong."""
        bucket = len(self._totals)
        routes, total = self._routes.routes[bucket], received.new_empty(self._routes.sum_numbers[bucket])
        base = list(accumulate((route.receive_numbers for route in routes), initial=0))
        if self._routes.alike[bucket]:
            parts = received.view(len(routes), routes[0].receive_numbers)
            for offset, target, length in routes[0].sums:
                self._add_up(parts[:, offset : offset + length], total[target : target + length])
        else:
            total.zero_()
            for begin, route in zip(base, routes, strict=False):
                for offset, target, length in route.sums:
                    # ``total[...] += `` would copy the sum onto itself.
                    total[target : target + length].add_(received[begin + offset : begin + offset + length])
        self._totals.append(total)
        for i, found in enumerate(self._elements):
            by_rows = self._plan.matrices[i].spec.by_rows
            for block, (_, _, whole) in zip(self._routes.blocks[i], found, strict=True):
                places = [place for place in block.places if place.bucket == bucket]
                if places:
                    out = whole[places[0].first : places[0].last]
                    theirs = [_part_at(received, base[place.peer] + place.offset, place, by_rows) for place in places]
                    torch.cat(theirs, dim=int(by_rows), out=out if by_rows else out.t())

    def of(self, i: int) -> Received:
        """What has arrived of matrix i, once all buckets have been taken."""
        spec, sums = self._plan.matrices[i].spec, []
        for bucket, offset, position, count in self._routes.owned[i]:
            total, end = self._totals[bucket], offset + count * spec.rank
            norms = total[end : end + count] if spec.channel_norms else None
            sums.append((slice(position, position + count), total[offset:end].view(count, spec.rank), norms))
        return Received(sums, self._elements[i])


def _part_at(received: Tensor, start: int, place: Place, by_rows: bool) -> Tensor:
    """Elements as they lie in a tile, from where they arrived."""
    shape = place.last - place.first, place.inner[1] - place.inner[0]
    return received[start : start + shape[0] * shape[1]].view(shape if by_rows else shape[::-1])
