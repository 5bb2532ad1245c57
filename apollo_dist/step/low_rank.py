"""Low-rank updates: products with P that owners make for ranks with few elements, and what local weights get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..exchange.messages import Answer

if TYPE_CHECKING:
    from ..projections.slices import Projection
    from ..sharding.regions import Range
    from .batch import Batch
    from .matrix import Matrix


class LowRankUpdate(NamedTuple):
    """(f D + N) P over the held channels of a matrix, where f D + N is one low-rank update.

    Attributes:
        low_rank: f D + N of the channels that this rank multiplies with P, (channels, r).
        projection: P; None where there are none.
        runs: which of the held channels those are; None for all.
        elements: of the others, (first held channel, tile number, elements, (channels, the tile's inner extent)).
        size: a factor of it.
    """

    low_rank: Tensor
    projection: Projection | None
    runs: tuple[Range, ...] | None = None
    elements: Sequence[tuple[int, int, Tensor]] = ()
    size: float = 1.0

    def times(self, size: float | Tensor) -> LowRankUpdate:
        """``size`` times it; a tensor is not waited for."""
        if not isinstance(size, Tensor):
            return self._replace(size=self.size * size)
        elements = [(first, tile, values * size) for first, tile, values in self.elements]
        return self._replace(low_rank=self.low_rank * size, elements=elements)

    def add(self, tile: int, position: slice | None, out: Tensor, inner: slice = slice(None)) -> None:
        """Add it over some held channels of a local tile to ``out``.

        Args:
            tile: its number.
            position: of the channels among the held ones; None for all.
            out: (channels, the tile's inner extent), in any strides.
            inner: which of the tile's inner extent ``out`` is.
        """
        start = 0 if position is None or position.start is None else position.start
        stop = start + out.shape[0]
        if self.projection is not None:
            at = 0
            for a, b in ((start, stop),) if self.runs is None else self.runs:
                low, high = max(a, start), min(b, stop)
                if low < high:
                    first = low if self.runs is None else at + low - a
                    rows = self.low_rank[first : first + high - low]
                    self.projection.add_product(rows, tile, out[low - start : high - start], self.size, inner)
                at += b - a
        for a, number, values in self.elements:
            low, high = max(a, start), min(a + len(values), stop)
            if number == tile and low < high:
                out[low - start : high - start].add_(values[low - a : high - a, inner], alpha=self.size)


def own_then_received(own: Tensor, received: Tensor) -> Tensor:
    """Numbers of the channels that this rank holds alone, then those of exchange 2; copied only if there are both."""
    received = received.to(own.dtype)
    if not received.numel():
        return own
    return torch.cat([own, received]) if own.numel() else received


def low_rank_update(
    m: Matrix, alone: Tensor, received: Tensor | Answer | None, projection: Projection | None
) -> LowRankUpdate:
    """What the owners of a matrix's held channels have answered, as an update.

    Args:
        m: the matrix.
        alone: the numbers of the channels that this rank holds alone or, without an exchange, of all held ones.
        received: what exchange 2 brought, if there was one.
        projection: P, if this rank multiplies with it.
    """
    numbers = received.numbers if isinstance(received, Answer) else received
    if numbers is not None:
        alone = own_then_received(alone[: m.channels.local_only.count], numbers)
    low_rank = alone[:, m.low_rank_columns]
    if not isinstance(received, Answer):
        return LowRankUpdate(low_rank, projection)
    base = m.channels.local_only.count
    elements = [(base + first, tile, values.to(alone.dtype)) for first, tile, values in received.elements]
    return LowRankUpdate(low_rank, projection, m.channels.multiplied, elements)


def join_updates(batch: Batch, owned: Sequence[Tensor], factor: Tensor | None) -> list[Tensor]:
    """What travels of the owned channels of a batch whose rule answers with a D: f s, and f D + N.

    Args:
        batch: the matrices.
        owned: for each what the rule answered, (channels, numbers); changed.
        factor: f of each, (matrices,), or None for 1.
    """
    columns = batch.declared.reply.columns(batch.declared.reduce.low_rank)
    first = [answer[:, : columns["residual"].stop] for answer in owned]
    if factor is not None:
        torch._foreach_mul_(first, list(factor.unbind()))
    if "direct" in columns:
        torch._foreach_add_(
            [answer[:, columns["residual"]] for answer in owned], [a[:, columns["direct"]] for a in owned]
        )
    return first


def products(m: Matrix, reply: Tensor, projection: Projection | None) -> list[Tensor]:
    """The low-rank updates of owned channels that other ranks get as elements, (channels, columns) each.

    Args:
        m: the matrix.
        reply: what travels of the owned channels, (channels, numbers).
        projection: P.
    """
    found = []
    for position, channels, (first, last) in m.channels.products:
        assert projection is not None
        start = m.channels.local_only.count + position
        rows = reply[start : start + channels, m.low_rank_columns]
        slab = projection.slab[first - projection.first : last - projection.first, : projection.rank].to(rows.dtype)
        found.append((rows @ slab.t()).mul_(projection.scale))
    return found
