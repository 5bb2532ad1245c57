"""The last phase of a step: one factor for each matrix, and the update of the local weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.transfer import to_device
from ..projections.slices import Phase
from .matrix import Matrix, cast, take

if TYPE_CHECKING:
    from ..projections.cache import ProjectionCache
    from ..projections.slices import Projection
    from .batch import Batch, Tiles


def apply(
    batch: Batch,
    carriers: Tiles,
    owned: Sequence[Tensor | None],
    replies: Sequence[Tensor | None],
    projections: ProjectionCache,
    terms: Tensor,
) -> None:
    """Let the rule see the sums over whole matrices, and update the local weights.

    Args:
        batch: the matrices.
        carriers: of the batch's matrices.
        owned: what ``own`` returned, for each matrix of the shard group.
        replies: for each matrix of the shard group what exchange 2 brought, or None.
        projections: of the shard group, in the current step.
        terms: (matrices of the shard group, columns), summed over ranks.
    """
    mine = terms[batch.first : batch.first + len(batch.matrices), : batch.declared.terms]
    factor, changed = batch.rule.matrix_step(mine, batch.matrix_state, batch.group)
    for name, values in changed.items():
        if not all(tiles is not None for tiles in carriers):
            moved = to_device([tiles is not None for tiles in carriers], torch.bool, values.device)
            values = torch.where(moved, values, batch.matrix_state[name])
        batch.matrix_state[name].copy_(values)
    active = [(k, tiles) for k, tiles in enumerate(carriers) if tiles is not None]
    factors = factor.unbind() if factor is not None else ()
    by: Sequence[Tensor | None] = [factors[k] if factors else None for k, _ in active]
    of_channels: Sequence[Mapping[str, Tensor]] = [{}] * len(active)
    columns = batch.declared.reply.columns(batch.declared.reduce.low_rank)
    if columns and active:
        held = [held_reply(batch.matrices[k], owned[batch.first + k], replies[batch.first + k]) for k, _ in active]
        of_channels = [{name: reply[:, where] for name, where in columns.items()} for reply in held]
    if batch.declared.reply.scale and active:
        scales = [found["scale"] for found in of_channels]
        by = torch._foreach_mul(scales, [factors[k] for k, _ in active]) if factors else scales
    for (k, tiles), coefficient, found in zip(active, by, of_channels, strict=True):
        m = batch.matrices[k]
        projection = projections.of(batch.first + k, Phase.APPLY) if m.spec.low_rank_updates else None
        update(m, tiles, coefficient, low_rank_update(found, factors[k] if factors else None), projection)


def shared_reply(m: Matrix, owned: Tensor | None) -> Tensor | None:
    """What exchange 2 carries: the numbers over ``owned_shared``, (channels, numbers)."""
    return None if owned is None else owned[m.channels.local_only.count :]


def held_reply(m: Matrix, owned: Tensor | None, received: Tensor | None) -> Tensor:
    """The numbers of the held channels, (channels, numbers): this rank's own, then those of exchange 2, if any.

    Args:
        m: the matrix.
        owned: what ``own`` returned; not None, for its rule answers.
        received: (channels, numbers).
    """
    assert owned is not None
    if received is None:
        return owned
    alone = owned[: m.channels.local_only.count]
    if not received.numel():
        return alone
    return torch.cat([alone, received.to(owned.dtype)]) if alone.numel() else received.to(owned.dtype)


def low_rank_update(of_channels: Mapping[str, Tensor], factor: Tensor | None) -> Tensor | None:
    """f D + N over the held channels, (channels, r); None where a rule has neither."""
    residual, direct = of_channels.get("residual"), of_channels.get("direct")
    if residual is None:
        return direct
    if factor is not None:
        residual = residual * factor
    return residual if direct is None else residual + direct


def update(
    m: Matrix,
    carriers: Sequence[Tensor],
    factor: Tensor | None,
    low_rank: Tensor | None = None,
    projection: Projection | None = None,
) -> None:
    """Update the local weights of one matrix.

    Args:
        m: the matrix.
        carriers: X of each tile; empty where there is no X.
        factor: of X: the scaling factors of the held channels times that of the matrix, (channels, 1); or
            for the whole matrix, a scalar; None for 1.
        low_rank: f D + N of the held channels, (channels, r), or None.
        projection: that it is multiplied by.
    """
    group, rule, dtype = m.group, m.rule, m.shard.compute_dtype
    value = -rule.gain(group)
    lr = group["lr"]
    # A tensor is not waited for.
    size = rule.step_size(lr.reshape(()).to(dtype) if isinstance(lr, Tensor) else lr, m.state["step"], group)
    if isinstance(size, Tensor):
        factor = size if factor is None else factor * size
        low_rank = None if low_rank is None else low_rank * size
    else:
        value *= size
    # R, and what owners make of it, is of the negated gradient where that is followed; norms do not differ.
    of_carrier = -value if group["maximize"] else value
    stored = m.shard.weight()
    weights, copied = m.split(stored)
    work = [cast(weight, dtype) for weight in weights]
    if rule.decay_first:
        decay(work, lr, rule.weight_decay(group))
    for number, rows, position in m.held.parts:
        target = take(work[number], rows)
        if carriers and factor is None:
            target.add_(take(carriers[number], rows), alpha=of_carrier)
        elif carriers and factor is not None:
            by = factor if factor.ndim == 0 else take(factor, position)
            target.addcmul_(take(carriers[number], rows), by, value=of_carrier)
        if low_rank is not None and projection is not None:
            projection.add_product(take(low_rank, position), number, target, value)
    if not rule.decay_first:
        decay(work, lr, rule.weight_decay(group))
    for weight, updated in zip(weights, work, strict=True):
        if updated is not weight:
            weight.copy_(updated)
    if copied is not None:
        stored.copy_(copied.view(stored.shape))


def decay(weights: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """Decoupled weight decay, in place, on weights of one device and dtype."""
    if not weight_decay or not weights:
        return
    if isinstance(lr, Tensor):
        factor = 1.0 - lr.reshape(()).to(weights[0].dtype) * weight_decay
        torch._foreach_mul_(weights, factor.to(weights[0].device, non_blocking=True))
    else:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
