"""The last phase of a step: one factor for each matrix, and the update of the local weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..exchange.messages import Answer
from ..kernels.parts import ApplyPart
from ..kernels.rounding import Rounding, key_of, write
from ..kernels.transfer import to_device
from ..projections.slices import Phase
from ..rules.groups import STOCHASTIC_ROUNDING
from .low_rank import LowRankUpdate, low_rank_update, own_then_received
from .matrix import Matrix, cast, take
from .rows import update_rows

if TYPE_CHECKING:
    from ..projections.cache import ProjectionCache
    from .batch import Batch, Tiles


class Updates(NamedTuple):
    """Updates of some matrices of one batch.

    Attributes:
        matrices: the matrices.
        coefficients: of them, (matrices, 2), as of ``_coefficients``.
        carriers: of them; empty where there is no X.
        scales: of each the scaling factors of its held channels, (channels, 1), or None.
        seed: of stochastic rounding.
        product: of the only one the step size times its low-rank update.
    """

    matrices: Sequence[Matrix]
    coefficients: Tensor
    carriers: Sequence[Sequence[Tensor]]
    scales: Sequence[Tensor | None]
    seed: int
    product: LowRankUpdate | None = None

    def of(self, chosen: Sequence[int]) -> Updates:
        """Those of some of the matrices, by number."""
        if len(chosen) == len(self.matrices):
            return self
        rows = to_device(list(chosen), torch.int64, self.coefficients.device)
        matrices, carriers = [self.matrices[k] for k in chosen], [self.carriers[k] for k in chosen]
        scales = [self.scales[k] for k in chosen]
        return Updates(matrices, self.coefficients[rows], carriers, scales, self.seed, self.product)


def apply(
    batch: Batch,
    carriers: Tiles,
    owned: Sequence[Tensor | None],
    replies: Sequence[Tensor | Answer | None],
    projections: ProjectionCache,
    terms: Tensor,
    seed: int,
) -> None:
    """Let the rule see the sums over whole matrices, and update the local weights.

    Args:
        batch: the matrices.
        carriers: of the batch's matrices; None for those without a gradient.
        owned: what ``own`` or ``answer_with_factors`` returned, for each matrix of the shard group.
        replies: for each matrix of the shard group what exchange 2 brought, or None.
        projections: of the shard group, in the current step.
        terms: (matrices of the shard group, columns), summed over ranks.
        seed: of stochastic rounding.
    """
    # Where the answers have the factors in them, the state is of this step already.
    factor = None if batch.declared.reply.residual else batch.factors([tiles is not None for tiles in carriers], terms)
    members = [k for k, tiles in enumerate(carriers) if tiles is not None]
    if not members:
        return
    if factor is not None and len(members) < len(batch.matrices):
        factor = factor[to_device(members, torch.int64, factor.device)]
    matrices, given = [batch.matrices[k] for k in members], [tiles for tiles in carriers if tiles is not None]
    coefficients = _coefficients(matrices, factor)
    scales = [_scales(batch.matrices[k], owned[batch.first + k], replies[batch.first + k]) for k in members]
    if not matrices[0].spec.low_rank_update:
        _update(Updates(matrices, coefficients, given, scales, seed))
        return
    # One matrix after the other: products with P go to weights in the compute dtype.
    for row, (k, m) in enumerate(zip(members, matrices, strict=True)):
        answered, received = owned[batch.first + k], replies[batch.first + k]
        assert answered is not None
        projection = projections.of(batch.first + k, Phase.APPLY)
        product = low_rank_update(m, answered, received, projection).times(_size(m))
        here = slice(row, row + 1)
        _update(Updates(matrices[here], coefficients[here], given[here], scales[here], seed, product))


def update(m: Matrix, carriers: Sequence[Tensor], seed: int) -> None:
    """Update the local weights of one matrix by the step size times X, channels first for each tile."""
    _update(Updates([m], _coefficients([m], None), [carriers], [None], seed))


def _scales(m: Matrix, owned: Tensor | None, received: Tensor | Answer | None) -> Tensor | None:
    """The scaling factors of the held channels, (channels, 1): this rank's own, then those of exchange 2; or None.

    Args:
        m: the matrix.
        owned: of its owned channels what travels.
        received: what exchange 2 brought, if there was one.
    """
    if not m.spec.channel_scales:
        return None
    assert owned is not None  # its rule answers
    if received is None:
        return owned[:, :1]
    alone = owned[: m.channels.local_only.count, :1]
    theirs = received.scales if isinstance(received, Answer) else received[:, :1]
    assert theirs is not None
    return own_then_received(alone, theirs)


def _update(updates: Updates) -> None:
    """Update the local weights of matrices, of which some may be stored by rows."""
    by_rows = [k for k, m in enumerate(updates.matrices) if m.shard.rows is not None]
    dense = [k for k, m in enumerate(updates.matrices) if m.shard.rows is None]
    if by_rows:
        rows = updates.of(by_rows)
        update_rows(rows.matrices, rows.coefficients, rows.carriers, rows.scales, rows.product)
    if dense:
        _update_dense(updates.of(dense))


def _update_dense(updates: Updates) -> None:
    """Update the local weights of matrices that are stored as one number an element."""
    matrices, coefficients, carriers, scales, seed, product = updates
    rule, group = matrices[0].rule, matrices[0].group
    parts: list[ApplyPart] = []
    work: list[Tensor] = []
    written: list[tuple[Tensor, Tensor, Rounding | None]] = []
    for row, (m, tiles, scale) in enumerate(zip(matrices, carriers, scales, strict=True)):
        stored = m.shard.weight()
        weights, copied = m.split(stored)
        roundings = _roundings(m, seed)
        work = weights if product is None else [cast(weight, m.shard.compute_dtype) for weight in weights]
        found = zip(weights, work, roundings, strict=True)
        written += [(weight, done, how) for weight, done, how in found if done is not weight]
        if copied is not None:
            written.append((stored, copied.view(stored.shape), None))
        for number, rows, position in m.held.parts if tiles else ():
            by, how = None if scale is None else take(scale[:, 0], position), roundings[number]
            how = None if how is None or product is not None else how.of_rows(rows)
            parts.append(ApplyPart(take(work[number], rows), take(tiles[number], rows), by, row, how))
    if product is not None and not rule.decay_first:
        _add_product(matrices[0], work, product)
    if parts:
        decays = rule.weight_decay(group) != 0.0
        matrices[0].kernels.apply(parts, coefficients, decay_first=rule.decay_first, decays=decays)
    elif product is not None:  # there is no X
        decay(work, group["lr"], rule.weight_decay(group))
    if product is not None and rule.decay_first:
        _add_product(matrices[0], work, product)
    for weight, done, how in written:
        write(weight, done, how)


def _roundings(m: Matrix, seed: int) -> list[Rounding | None]:
    """How the new weights of each tile, channels first, are rounded stochastically; None for to nearest."""
    if not m.group[STOCHASTIC_ROUNDING] or not m.shard.in_bfloat16:
        return [None] * len(m.tiles)
    key, n = key_of(seed, m.spec.name), m.spec.n
    strides = (n, 1) if m.spec.by_rows else (1, n)
    step: int = m.state["step"]
    return [Rounding(key, step, tile.row * n + tile.column, strides) for tile in m.tiles]


def _add_product(m: Matrix, work: Sequence[Tensor], product: LowRankUpdate) -> None:
    """Add a low-rank update to weights in the compute dtype, one for each tile, channels first."""
    for number, rows, position in m.held.parts:
        product.add(number, position, take(work[number], rows))


def _size(m: Matrix) -> float | Tensor:
    """What low-rank updates are multiplied by. They are of the negated gradient where that is followed."""
    lr, dtype = m.group["lr"], m.shard.compute_dtype
    lr = lr.reshape(()).to(dtype) if isinstance(lr, Tensor) else lr
    size: float | Tensor = -m.rule.gain(m.group) * m.rule.step_size(lr, m.state["step"], m.group)
    return size


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


def decay(weights: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """Decoupled weight decay, in place, on weights of one device and dtype."""
    if not weight_decay or not weights:
        return
    if isinstance(lr, Tensor):
        factor = 1.0 - lr.reshape(()).to(weights[0].dtype) * weight_decay
        torch._foreach_mul_(weights, factor.to(weights[0].device, non_blocking=True))
    else:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
