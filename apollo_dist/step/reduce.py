"""The first phase of a step: from local gradients to what the owners of channels see of them.

For channels that other ranks hold too, each rank computes its part of R = G P^T and of the squared norms (``partial``);
exchange 1 brings the parts to the owners. Channels that one rank alone holds, and elements that others send to be
projected here, are taken by ``complete``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..exchange.channels import ChannelSet
from ..exchange.messages import Partial, Received
from ..kernels.reduce import channel_norms, project
from .matrix import Matrix, Pieces, cast, take

if TYPE_CHECKING:
    from ..projections.slices import Projection
    from ..sharding.regions import Range


def partial(m: Matrix, projection: Projection | None, active: bool) -> Partial:
    """What exchange 1 takes from this rank: its part of R and of the squared norms, and gradient elements.

    Sizes depend on the plan alone: without a gradient (``active`` False) the parts are zeros.

    Args:
        m: the matrix.
        projection: of the current step; None if there is nothing to project, or no gradient.
        active: whether there is a gradient.
    """
    count = m.channels.projected.count
    low_rank = torch.zeros((count, m.spec.rank), **m.factory_kwargs)
    norms = torch.zeros(count, **m.factory_kwargs) if m.spec.channel_norms else None
    if not active or not m.channels.shared.count:
        return Partial(low_rank, norms, None)
    stored = m.reduced()
    if count:
        grads = [cast(view, m.shard.compute_dtype) for view in stored]
        _project(grads, m.projected, projection, low_rank, 1.0)
        if norms is not None:
            _channel_norms(grads, m.projected, norms)
            norms.square_()
    return Partial(low_rank, norms, stored if m.spec.by_rows else [view.t() for view in stored])


def complete(
    m: Matrix,
    grads: Sequence[Tensor],
    low_rank: Tensor,
    norms: Tensor | None,
    projection: Projection | None,
    received: Received | None,
) -> None:
    """Write R, and the gradient's norms, over the owned channels: held by this rank only first, then received ones.

    Here R gets the factor that random projections are generated without, and its sign.

    Args:
        m: the matrix.
        grads: what is reduced of each tile, in the compute dtype.
        low_rank: (owned channels, r), written.
        norms: (owned channels,), written; None where norms by channel are not needed.
        projection: of the current step; None if there is nothing to project.
        received: what exchange 1 brought for ``owned_shared``, if there was one.
    """
    alone = m.channels.local_only.count
    alpha = m.projection_scale * (-1.0 if m.group["maximize"] else 1.0)
    if alone:
        first = None if alone == low_rank.shape[0] else slice(alone)
        _project(grads, m.local_only, projection, take(low_rank, first), alpha)
        if norms is not None:
            _channel_norms(grads, m.local_only, take(norms, first))
    if received is not None and m.channels.owned_shared.count:
        torch.mul(received.low_rank, alpha, out=low_rank[alone:])
        squares = None if norms is None or received.norms is None else received.norms.to(norms.dtype)
        for channels, inner, elements in received.elements:
            part = elements.to(m.shard.compute_dtype)
            if m.spec.rank:
                low_rank[alone:][channels].addmm_(part, _columns(projection, inner, m.spec.rank), alpha=alpha)
            if squares is not None:
                lengths = torch.empty_like(squares[channels])
                channel_norms(part, lengths)
                squares[channels].addcmul_(lengths, lengths)
        if norms is not None and squares is not None:
            torch.sqrt(squares, out=norms[alone:])


def _project(grads: Sequence[Tensor], pieces: Pieces, projection: Projection | None, out: Tensor, alpha: float) -> None:
    """Write this rank's part of R times ``alpha`` over a set of channels to ``out``, (channels, r).

    R = G P^T where rows are the channels; else R^T = (P G)^T = G^T P^T, stored channels first alike. Each tile needs
    only the columns of P that it spans.
    """
    if not pieces.parts or not out.shape[1]:
        return
    assert projection is not None
    if pieces.overlapping:
        out.zero_()
    for number, rows, position in pieces.parts:
        part, target = take(grads[number], rows), take(out, position)
        if pieces.overlapping:
            target.addmm_(part, projection.tiles[number][:, : out.shape[1]], alpha=alpha)
        else:
            project(part, projection.tiles[number], target, alpha)


def _channel_norms(grads: Sequence[Tensor], pieces: Pieces, out: Tensor) -> None:
    """Write the norm of this rank's part of each channel's gradient over a set of channels, (channels,)."""
    if not pieces.overlapping:
        for number, rows, position in pieces.parts:
            channel_norms(take(grads[number], rows), take(out, position))
        return
    out.zero_()
    for number, rows, position in pieces.parts:
        part, total = take(grads[number], rows), take(out, position)
        norms = torch.empty_like(total)
        channel_norms(part, norms)
        total.addcmul_(norms, norms)
    out.sqrt_()


def _columns(projection: Projection | None, inner: Sequence[Range], rank: int) -> Tensor:
    """P^T of some ranges of the projected dimension, (their lengths, r), for elements of other ranks."""
    assert projection is not None
    first, slab = projection.first, projection.slab[:, :rank]
    parts = [slab[a - first : b - first] for a, b in ChannelSet.merged(inner).ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
