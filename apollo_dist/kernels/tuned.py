"""Kernels over many matrices in torch's operations, one matrix after the other.

What a gradient is read for follows at once, while it is in a CPU's cache. Signatures as in ``kernels.reference``;
gradients are in the dtype of the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adam import adam_direction
from .reduce import channel_norms, line_norms
from .reduce import project as project_one
from .rounding import write

if TYPE_CHECKING:
    from .parts import ApplyPart, ProjectPart


def project(
    parts: Sequence[ProjectPart],
    alpha: float,
    out: Tensor,
    squares: Tensor | None,
    totals: list[tuple[Tensor, int]] | None = None,
) -> None:
    """As ``kernels.reference.project``; rows that no part has are left as they are, but for those of ``squares``."""
    for part in parts:
        if part.adds:
            rows = slice(part.first, part.first + part.grad.shape[0])
            out[rows].zero_()
            if squares is not None:
                squares[rows].zero_()
    rank, together = out.shape[1], not any(part.adds for part in parts)
    for grad, columns, first, matrix, adds in parts:
        rows = slice(first, first + grad.shape[0])
        if rank:
            assert columns is not None
            if adds:
                out[rows].addmm_(grad, columns[:, :rank], alpha=alpha)
            else:
                project_one(grad, columns, out[rows], alpha)
        if squares is not None:
            mine = squares[rows]
            if adds:
                norms = torch.empty_like(mine)
                channel_norms(grad, norms)
                mine.addcmul_(norms, norms)
            else:
                channel_norms(grad, mine)
                if not together:
                    mine.square_()
        if totals is not None and grad.numel():
            totals.append((line_norms(grad), matrix))
    if squares is not None and together:
        squares.square_()


def moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_rank: Tensor,
    normalized_squares: Tensor,
    low_rank_squares: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    workspace: Tensor | None = None,
) -> None:
    """As ``kernels.reference.moments``."""
    normalized = torch.empty_like(low_rank) if workspace is None else workspace
    adam_direction(exp_avg, exp_avg_sq, low_rank, normalized, betas=betas, eps=eps)
    # Two calls, not one stacked call: OpenMP gives the same rows to the same thread, so they are still in that core's
    # L2. Measured: 12 % of a CPU step.
    torch.linalg.vector_norm(normalized, dim=1, out=normalized_squares).square_()
    torch.linalg.vector_norm(low_rank, dim=1, out=low_rank_squares).square_()


def apply(parts: Sequence[ApplyPart], coefficients: Tensor, *, decay_first: bool = False, decays: bool = True) -> None:
    """As ``kernels.reference.apply``, in the dtype of the coefficients."""
    if not parts:
        return
    factor_of, kept_of = (column.unbind() for column in coefficients.unbind(1))
    by: list[Tensor] = [factor_of[part.matrix] for part in parts]
    scaled = [i for i, part in enumerate(parts) if part.scale is not None]
    if scaled:
        scales = [part.scale for part in parts if part.scale is not None]
        for i, product in zip(scaled, torch._foreach_mul(scales, [by[i] for i in scaled]), strict=True):
            by[i] = product.unsqueeze(1)
    for part, factor in zip(parts, by, strict=True):
        apply_one(part, factor, kept_of[part.matrix] if decays else None, decay_first=decay_first)


def apply_one(part: ApplyPart, factor: Tensor, kept: Tensor | None, *, decay_first: bool) -> None:
    """Update one rectangle, in the dtype of ``factor``; where nothing decays ``kept`` is None."""
    work = part.weight.to(factor.dtype)
    if kept is not None and decay_first:
        work.mul_(kept)
    work.addcmul_(part.grad, factor)
    if kept is not None and not decay_first:
        work.mul_(kept)
    if work is not part.weight:
        write(part.weight, work, part.rounding)
