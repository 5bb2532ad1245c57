"""The first phase of a step: from local gradients to what the owners of channels see of them.

For channels that other ranks hold too, each rank computes its part of R = G P^T and of the squared norms
(``partials``); exchange 1 brings the parts to the owners. Channels that one rank alone holds are ``parts_of`` a matrix,
which the owner takes to the kernels; what exchange 1 has brought is added by ``receive``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..exchange.channels import ChannelSet
from ..exchange.messages import Partial, Received
from ..kernels.parts import ProjectPart
from ..kernels.reduce import channel_norms
from .matrix import Matrix, Pieces, take

if TYPE_CHECKING:
    from ..projections.slices import Projection
    from ..sharding.regions import Range


def partials(
    matrices: Mapping[int, Matrix],
    projection_of: Callable[[int], Projection | None],
    active: Sequence[bool],
) -> dict[int, Partial]:
    """What exchange 1 takes from this rank: of each matrix its part of R and of the squared norms, and elements.

    Sizes depend on the plan alone: without a gradient the parts are zeros.

    Args:
        matrices: some of a shard group, by number.
        projection_of: of the current step, by the number of a matrix; None if there is nothing to project.
        active: for each matrix of the shard group whether it has a gradient.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for k, m in matrices.items():
        # What is converted for one matrix goes before the next one's comes.
        alone = () if m.kernels.together else (k,)
        key = (m.kernels, m.shard.compute_dtype, m.spec.rank, m.spec.channel_norms, *alone)
        alike.setdefault(key, []).append(k)
    found: dict[int, Partial] = {}
    for members in alike.values():
        found |= _partials({k: matrices[k] for k in members}, projection_of, active)
    return found


def _partials(
    matrices: dict[int, Matrix],
    projection_of: Callable[[int], Projection | None],
    active: Sequence[bool],
) -> dict[int, Partial]:
    """The same for matrices of one rank, dtype and kind of kernels, in one call of a kernel."""
    first = next(iter(matrices.values()))
    counts = [m.channels.projected.count for m in matrices.values()]
    # Every channel of a matrix with a gradient is written.
    make = torch.empty if all(active[k] for k in matrices) else torch.zeros
    low_rank = make((sum(counts), first.spec.rank), **first.factory_kwargs)
    squares = make(sum(counts), **first.factory_kwargs) if first.spec.channel_norms else None
    parts: list[ProjectPart] = []
    tiles: dict[int, list[Tensor] | None] = {}
    row = 0
    for (k, m), count in zip(matrices.items(), counts, strict=True):
        projection = projection_of(k)
        tiles[k] = m.reduced() if active[k] and m.channels.shared.count else None
        stored = tiles[k]
        if stored is not None and count:
            parts += parts_of([m.taken(tile) for tile in stored], m.projected, projection, row)
        row += count
    if parts:
        first.kernels.project(parts, 1.0, low_rank, squares)
    by_matrix = torch.split(low_rank, counts)
    squares_of = [None] * len(counts) if squares is None else torch.split(squares, counts)
    found = {}
    for (k, m), mine, lengths in zip(matrices.items(), by_matrix, squares_of, strict=True):
        stored = tiles[k]
        if stored is not None and not m.spec.by_rows:
            stored = [tile.t() for tile in stored]
        found[k] = Partial(mine, lengths, stored)
    return found


def parts_of(
    tiles: Sequence[Tensor], pieces: Pieces, projection: Projection | None, first: int, matrix: int = 0
) -> list[ProjectPart]:
    """The local elements of a set of channels, for a kernel that projects them.

    R = G P^T where rows are the channels; else R^T = (P G)^T = G^T P^T, stored channels first alike. Each tile needs
    only the columns of P that it spans.

    Args:
        tiles: of the matrix, channels first.
        pieces: how they overlap the channels.
        projection: of the current step; None if there is nothing to project.
        first: the row of the kernel's output that the first of the channels is.
        matrix: the number that the parts get.
    """
    return [
        ProjectPart(
            take(tiles[number], rows),
            None if projection is None else projection.tiles[number],
            first + (0 if position is None else position.start),
            matrix,
            pieces.overlapping,
        )
        for number, rows, position in pieces.parts
    ]


def receive(
    m: Matrix,
    low_rank: Tensor,
    squares: Tensor | None,
    projection: Projection | None,
    received: Received,
    alpha: float,
) -> None:
    """Write R, and the squared norms of the gradient, over the owned channels that other ranks hold, too.

    Args:
        m: the matrix.
        low_rank: (owned channels, r); the last rows are written.
        squares: (owned channels,), likewise; None where norms by channel are not needed.
        projection: of the current step; None if there is nothing to project.
        received: what exchange 1 brought for ``owned_shared``.
        alpha: what sums are multiplied by.
    """
    if not m.channels.owned_shared.count:
        return
    alone = m.channels.local_only.count
    for channels, summed, norms in received.sums:
        torch.mul(summed, alpha, out=low_rank[alone:][channels])
        if squares is not None and norms is not None:
            squares[alone:][channels] = norms
    for channels, inner, elements in received.elements:
        part = elements.to(m.shard.compute_dtype)
        if m.spec.rank:
            columns = _columns(projection, inner, m.spec.rank).to(part.dtype)
            low_rank[alone:][channels].addmm_(part, columns, alpha=alpha)
        if squares is not None:
            lengths = torch.empty_like(squares[alone:][channels])
            channel_norms(part, lengths)
            squares[alone:][channels].addcmul_(lengths, lengths)


def _columns(projection: Projection | None, inner: Sequence[Range], rank: int) -> Tensor:
    """P^T of some ranges of the projected dimension, (their lengths, r), for elements of other ranks."""
    assert projection is not None
    first, slab = projection.first, projection.slab[:, :rank]
    parts = [slab[a - first : b - first] for a, b in ChannelSet.merged(inner).ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
