"""The last phase of a step: one factor for each matrix, and the update of the local weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.transfer import to_device
from .matrix import Matrix, cast, take

if TYPE_CHECKING:
    from .batch import Batch, Tiles


def apply(
    batch: Batch, carriers: Tiles, owned: Sequence[Tensor | None], replies: Sequence[Tensor | None], terms: Tensor
) -> None:
    """Let the rule see the sums over whole matrices, and update the local weights.

    Args:
        batch: the matrices.
        carriers: of the batch's matrices.
        owned: what ``own`` returned, for each matrix of the shard group.
        replies: for each matrix of the shard group the scaling factors from exchange 2, or None.
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
    if batch.declared.reply.scale and active:
        scales = [held_scale(batch.matrices[k], owned[batch.first + k], replies[batch.first + k]) for k, _ in active]
        by = torch._foreach_mul(scales, [factors[k] for k, _ in active]) if factors else scales
    for (k, tiles), coefficient in zip(active, by, strict=True):
        update(batch.matrices[k], tiles, coefficient)


def shared_scale(m: Matrix, owned: Tensor | None) -> Tensor | None:
    """What exchange 2 carries: the scaling factors over ``owned_shared``, (channels,)."""
    return None if owned is None else owned[m.channels.local_only.count :, 0]


def held_scale(m: Matrix, owned: Tensor | None, received: Tensor | None) -> Tensor:
    """The scaling factors of the held channels, (channels, 1): this rank's own, then those of exchange 2, if any.

    Args:
        m: the matrix.
        owned: what ``own`` returned; not None, for its rule has scaling factors.
        received: (channels,).
    """
    assert owned is not None
    if received is None:
        return owned
    alone = owned[: m.channels.local_only.count]
    return torch.cat([alone, received.to(owned.dtype)[:, None]]) if received.numel() else alone


def update(m: Matrix, carriers: Sequence[Tensor], factor: Tensor | None) -> None:
    """Update the local weights of one matrix.

    Args:
        m: the matrix.
        carriers: X of each tile.
        factor: of X: the scaling factors of the held channels times that of the matrix, (channels, 1); or
            for the whole matrix, a scalar; None for 1.
    """
    group, rule, dtype = m.group, m.rule, m.shard.compute_dtype
    # R is made of the negated gradient in ``complete``; norms do not differ.
    value = (1.0 if group["maximize"] else -1.0) * rule.gain(group)
    lr = group["lr"]
    # A tensor is not waited for.
    size = rule.step_size(lr.reshape(()).to(dtype) if isinstance(lr, Tensor) else lr, m.state["step"], group)
    if isinstance(size, Tensor):
        factor = size if factor is None else factor * size
    else:
        value *= size
    stored = m.shard.weight()
    weights, copied = m.split(stored)
    work = [cast(weight, dtype) for weight in weights]
    if rule.decay_first:
        decay(work, lr, rule.weight_decay(group))
    for number, rows, position in m.held.parts:
        target, carrier = take(work[number], rows), take(carriers[number], rows)
        if factor is None:
            target.add_(carrier, alpha=value)
        else:
            target.addcmul_(carrier, factor if factor.ndim == 0 else take(factor, position), value=value)
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
