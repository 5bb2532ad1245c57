"""Low-rank updates that travel back as elements, where a holder has fewer than r elements of a channel.

Of a low-rank update A P a holder needs r numbers of each of its channels, A, or the elements of A P that it holds. The
second is less where it holds fewer than r elements of a channel; the channel's owner then multiplies. Integers only.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..sharding.regions import Range
    from .plan import MatrixPlan


class Product(NamedTuple):
    """A P of owned channels, from ``position`` on in ``owned_shared``, over all columns that others need of it."""

    position: int
    channels: int
    inner: Range


class ProductPart(NamedTuple):
    """What one rank's tile needs of a product: its rows first .. last, and the columns ``inner`` of P."""

    product: int
    first: int
    last: int
    inner: Range


class HeldPart(NamedTuple):
    """The same as the holder sees it: channels first .. last, counted from the first one of the share, in a tile."""

    tile: int
    first: int
    last: int
    inner: Range


def held_as_elements(matrix: MatrixPlan, rank: int) -> dict[int, list[HeldPart]]:
    """By share of a matrix what this rank gets as elements."""
    if not matrix.spec.low_rank_update or not matrix.shared:
        return {}
    partition, shares = matrix.partition, matrix.shares
    found = partition.overlaps(shares.starts, shares.stops, partition.tiles_of(rank))
    elements = np.bincount(found.range, found.elements, minlength=len(shares.starts)).astype(np.int64)
    chosen = (elements > 0) & (shares.owners != rank) & matrix.spec.replies_elements(elements, shares.counts)
    parts: dict[int, list[HeldPart]] = defaultdict(list)
    for at, share in enumerate(found.range.tolist()):
        if chosen[share]:
            tile, start = int(found.tile[at]), int(shares.starts[share])
            inner = int(partition.inner_start[tile]), int(partition.inner_stop[tile])
            first, last = int(found.first[at]) - start, int(found.last[at]) - start
            parts[share].append(HeldPart(int(partition.number[tile]), first, last, inner))
    return dict(parts)


def owned_as_elements(
    matrix: MatrixPlan, rank: int, world: int
) -> tuple[list[Product], dict[tuple[int, int], list[ProductPart]]]:
    """The products that this rank makes of a matrix, and by (share, holder) what it sends of them."""
    if not matrix.spec.low_rank_update or not matrix.shared:
        return [], {}
    partition, shares = matrix.partition, matrix.shares
    (mine,) = np.nonzero(shares.owners == rank)
    starts, stops = shares.starts[mine], shares.stops[mine]
    counts = stops - starts
    found = partition.overlaps(starts, stops)
    held = partition.held(found, world)
    chosen = matrix.spec.replies_elements(held[2], counts[held[0]]) & (held[1] != rank)
    wanted = set(zip(held[0][chosen].tolist(), held[1][chosen].tolist(), strict=True))
    pieces: dict[int, list[tuple[int, ProductPart]]] = defaultdict(list)
    numbers = {share: number for number, share in enumerate(sorted({share for share, _ in wanted}))}
    for at, key in enumerate(zip(found.range.tolist(), partition.rank[found.tile].tolist(), strict=True)):
        if key in wanted:
            tile, start = int(found.tile[at]), int(starts[key[0]])
            inner = int(partition.inner_start[tile]), int(partition.inner_stop[tile])
            first, last = int(found.first[at]) - start, int(found.last[at]) - start
            pieces[key[0]].append((key[1], ProductPart(numbers[key[0]], first, last, inner)))
    positions = (np.cumsum(counts) - counts).tolist()
    products = []
    parts: dict[tuple[int, int], list[ProductPart]] = defaultdict(list)
    for share in numbers:
        edges = [edge for _, part in pieces[share] for edge in part.inner]
        products.append(Product(positions[share], int(counts[share]), (min(edges), max(edges))))
        for holder, part in pieces[share]:
            parts[int(mine[share]), holder].append(part)
    return products, dict(parts)
