"""The last phase of a step: one factor for each matrix, and the update of the local weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.parts import ApplyPart
from ..kernels.transfer import to_device
from ..projections.slices import Phase
from .matrix import Matrix, cast, take
from .rows import update_rows

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
    active = [k for k, tiles in enumerate(carriers) if tiles is not None]
    if not active:
        return
    if factor is not None and len(active) < len(batch.matrices):
        factor = factor[to_device(active, torch.int64, factor.device)]
    matrices, given = [batch.matrices[k] for k in active], [tiles for tiles in carriers if tiles is not None]
    coefficients = _coefficients(matrices, factor)
    of_channels = _of_channels(batch, active, owned, replies)
    if not matrices[0].spec.low_rank_updates:
        _update(matrices, coefficients, given, [found.get("scale") for found in of_channels])
        return
    # One matrix after the other: products with P go to weights in the compute dtype.
    for row, (k, found) in enumerate(zip(active, of_channels, strict=True)):
        product = low_rank_update(found, None if factor is None else factor[row])
        projection = projections.of(batch.first + k, Phase.APPLY)
        here = slice(row, row + 1)
        _update(matrices[here], coefficients[here], given[here], [found.get("scale")], (product, projection))


def update(m: Matrix, carriers: Sequence[Tensor]) -> None:
    """Update the local weights of one matrix by the step size times X, channels first for each tile."""
    _update([m], _coefficients([m], None), [carriers], [None])


def _of_channels(
    batch: Batch, members: Sequence[int], owned: Sequence[Tensor | None], replies: Sequence[Tensor | None]
) -> list[Mapping[str, Tensor]]:
    """For each member what the owners answered of its held channels, (channels, width), by the names of ``Reply``."""
    columns = batch.declared.reply.columns(batch.declared.reduce.low_rank)
    if not columns:
        return [{} for _ in members]
    held = [held_reply(batch.matrices[k], owned[batch.first + k], replies[batch.first + k]) for k in members]
    return [{name: reply[:, where] for name, where in columns.items()} for reply in held]


def _update(
    matrices: Sequence[Matrix],
    coefficients: Tensor,
    carriers: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor | None],
    product: tuple[Tensor | None, Projection | None] | None = None,
) -> None:
    """Update the local weights of matrices of one batch, those that are stored by rows one after the other.

    Args:
        matrices, coefficients, carriers, scales, product: as of ``_update_dense``.
    """
    dense = [k for k, m in enumerate(matrices) if m.shard.rows is None]
    for k, m in enumerate(matrices):
        if m.shard.rows is not None:
            low_rank, projection = product or (None, None)
            low_rank, size = (None, 0.0) if low_rank is None else _sized(m, low_rank)
            update_rows(m, coefficients[k : k + 1], carriers[k], scales[k], low_rank, size, projection)
    if len(dense) == len(matrices):
        _update_dense(matrices, coefficients, carriers, scales, product)
    elif dense:
        rows = to_device(dense, torch.int64, coefficients.device)
        given, by = [carriers[k] for k in dense], [scales[k] for k in dense]
        _update_dense([matrices[k] for k in dense], coefficients[rows], given, by, product)


def _update_dense(
    matrices: Sequence[Matrix],
    coefficients: Tensor,
    carriers: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor | None],
    product: tuple[Tensor | None, Projection | None] | None = None,
) -> None:
    """Update the local weights of matrices of one batch that are stored as one number an element.

    Args:
        matrices: the matrices.
        coefficients: of them, (matrices, 2).
        carriers: of them; empty where there is no X.
        scales: of each the scaling factors of its held channels, (channels, 1), or None.
        product: of the only one f D + N, (channels, r), and the projection that it is multiplied by.
    """
    rule, group = matrices[0].rule, matrices[0].group
    parts: list[ApplyPart] = []
    work: list[Tensor] = []
    written: list[tuple[Tensor, Tensor]] = []
    for row, (m, tiles, scale) in enumerate(zip(matrices, carriers, scales, strict=True)):
        stored = m.shard.weight()
        weights, copied = m.split(stored)
        work = weights if product is None else [cast(weight, m.shard.compute_dtype) for weight in weights]
        written += [(weight, done) for weight, done in zip(weights, work, strict=True) if done is not weight]
        if copied is not None:
            written.append((stored, copied.view(stored.shape)))
        for number, rows, position in m.held.parts if tiles else ():
            by = None if scale is None else take(scale[:, 0], position)
            parts.append(ApplyPart(take(work[number], rows), take(tiles[number], rows), by, row))
    if product is not None and not rule.decay_first:
        _add_product(matrices[0], work, *product)
    if parts:
        decays = rule.weight_decay(group) != 0.0
        matrices[0].kernels.apply(parts, coefficients, decay_first=rule.decay_first, decays=decays)
    elif product is not None:  # there is no X
        decay(work, group["lr"], rule.weight_decay(group))
    if product is not None and rule.decay_first:
        _add_product(matrices[0], work, *product)
    for weight, done in written:
        weight.copy_(done)


def _add_product(m: Matrix, work: Sequence[Tensor], low_rank: Tensor | None, projection: Projection | None) -> None:
    """Add the step size times (f D + N) P to weights in the compute dtype.

    Args:
        m: the matrix.
        work: the weights of its tiles, channels first.
        low_rank: f D + N of the held channels, (channels, r).
        projection: P.
    """
    if low_rank is None or projection is None:  # this rank holds nothing of the matrix
        return
    low_rank, size = _sized(m, low_rank)
    for number, rows, position in m.held.parts:
        projection.add_product(take(low_rank, position), number, take(work[number], rows), size)


def _sized(m: Matrix, low_rank: Tensor) -> tuple[Tensor, float]:
    """A low-rank update of the held channels and the factor of its product with P: the step size, where it is a number.

    Args:
        m: the matrix.
        low_rank: f D + N, (channels, r).
    """
    lr, dtype = m.group["lr"], m.shard.compute_dtype
    lr = lr.reshape(()).to(dtype) if isinstance(lr, Tensor) else lr
    # Low-rank updates are of the negated gradient where that is followed: owners made them of R.
    size = -m.rule.gain(m.group) * m.rule.step_size(lr, m.state["step"], m.group)
    return (low_rank * size, 1.0) if isinstance(size, Tensor) else (low_rank, size)


def _coefficients(matrices: Sequence[Matrix], factor: Tensor | None) -> Tensor:
    """What the X of matrices of one batch, times scaling factors, and old weights are multiplied by, (matrices, 2).

    Args:
        matrices: the matrices.
        factor: what the rule's ``matrix_step`` returned for them, (matrices,), or None for 1.
    """
    m = matrices[0]
    group, rule = m.group, m.rule
    dtype, device = m.shard.compute_dtype, m.shard.device
    # R is made of the negated gradient in ``own``; norms do not differ.
    value = (1.0 if group["maximize"] else -1.0) * rule.gain(group)
    lr, steps = group["lr"], [one.state["step"] for one in matrices]
    if isinstance(lr, Tensor):
        # A tensor is not waited for.
        lr = lr.reshape(()).to(device, dtype, non_blocking=True)
        by_step = {step: rule.step_size(lr, step, group) * value for step in dict.fromkeys(steps)}
        sizes = torch.stack([by_step[step] for step in steps])
        kept = (1.0 - lr * rule.weight_decay(group)).expand(len(matrices))
    else:
        decayed = 1.0 - lr * rule.weight_decay(group)
        rows = [[rule.step_size(lr, step, group) * value, decayed] for step in steps]
        sizes, kept = to_device(rows, dtype, device).unbind(1)
    if factor is not None:
        sizes = sizes * factor
    return torch.stack([sizes, kept], dim=1)


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


def decay(weights: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """Decoupled weight decay, in place, on weights of one device and dtype."""
    if not weight_decay or not weights:
        return
    if isinstance(lr, Tensor):
        factor = 1.0 - lr.reshape(()).to(weights[0].dtype) * weight_decay
        torch._foreach_mul_(weights, factor.to(weights[0].device, non_blocking=True))
    else:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
