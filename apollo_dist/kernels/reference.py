"""The definition, in torch operations, of the kernels over many matrices; ``triton/`` has the same signatures.

Arithmetic is in fp32, whatever gradients and weights are stored in, and rounds once where a weight is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .philox import philox_4x32_10
from .quantizer import dequantize, quantize
from .rounding import random_bits, write

if TYPE_CHECKING:
    from .parts import AdamWPart, ApplyPart, ProjectPart, RowsPart
    from .rounding import Rounding


def draw(keys: Tensor, table: Tensor, out: Tensor) -> None:
    """Generate slabs of projections, unscaled N(0, 1).

    The counter is (column, row // 8, two words of the slab's hash). One Philox call makes eight rows of one column: the
    low and the high half of each word are an index into ``table``.

    Args:
        keys: (slabs, 5) in int64: two words of key, two of counter, the first column.
        table: ``projections.quantiles``, (65536,).
        out: (slabs, r, columns), written; any dtype and strides.
    """
    slabs, rank, length = out.shape
    # What is looked up, and not Philox, takes most of the time: at rank 1 only one in eight is.
    index = _words(keys, length, -(-rank // 8)).view(torch.uint16)[:, :, :rank].to(torch.int32)
    entries = table.index_select(0, index.view(-1))
    out.copy_(entries.view(slabs, length, rank).transpose(1, 2))


def draw_signs(keys: Tensor, out: Tensor) -> None:
    """Generate slabs of projections of signs, +1 and -1 with the same probability.

    The counter is (column, row // 128, two words of the slab's hash). Row 32 i + b of the 128 that one Philox call
    makes is -1 where bit b of word i is set.

    Args:
        keys, out: as of ``draw``.
    """
    slabs, rank, length = out.shape
    bits = torch.arange(min(rank, 64), device=out.device)
    words = _words(keys, length, -(-rank // 128))[:, :, : -(-rank // 64), None]
    ones = (words >> bits).bitwise_and_(1)
    out.copy_(1 - 2 * ones.view(slabs, length, -1)[:, :, :rank].transpose(1, 2))


def _words(keys: Tensor, length: int, calls: int) -> Tensor:
    """Philox's words of some columns, (slabs, length, 2 calls) in int64: the four words of a call, two in each."""
    k0, k1, c2, c3, start = keys[:, :, None, None].unbind(1)
    columns = start + torch.arange(length, device=keys.device)[:, None]
    rows = torch.arange(calls, device=keys.device)
    w0, w1, w2, w3 = philox_4x32_10((columns, rows, c2, c3), (k0, k1))
    return torch.stack([w0 | (w1 << 32), w2 | (w3 << 32)], dim=-1).view(*w0.shape[:2], -1)


def add_up(parts: Tensor, out: Tensor) -> None:
    """Sum what ranks sent, in rank order.

    Args:
        parts: (world, numbers), the rows contiguous.
        out: (numbers,), contiguous, written.
    """
    out.zero_()
    for part in parts.unbind():
        out.add_(part)


def project(
    parts: Sequence[ProjectPart],
    alpha: float,
    out: Tensor,
    squares: Tensor | None,
    totals: list[tuple[Tensor, int]] | None = None,
) -> None:
    """R = alpha G P^T of many rectangles, and the squared norms of their channels.

    Args:
        parts: the rectangles; every row of ``out`` must be a channel of at least one.
        alpha: multiplies the sums: 1 / sqrt(r), negative to follow the negated gradient.
        out: (channels, r) in fp32, contiguous, written.
        squares: (channels,) in fp32, written; None where they are not needed.
        totals: a list that gets tensors, each with the number of a matrix: the squared norms of those of one matrix sum
            to that of all its parts. None where they are not needed.
    """
    out.zero_()
    if squares is not None:
        squares.zero_()
    for grad, columns, first, matrix, _ in parts:
        rows = slice(first, first + grad.shape[0])
        values = grad.float()
        assert columns is not None
        out[rows].addmm_(values, columns.float())
        if squares is not None:
            squares[rows] += values.square().sum(1)
        if totals is not None:
            totals.append((values, matrix))
    out.mul_(alpha)


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
    r"""Update both moments with R, and write squared norms by channel: of :math:`N = M / (\sqrt{V} + \epsilon)` and R.

    Args:
        exp_avg, exp_avg_sq: (channels, r) in fp32, contiguous, updated.
        low_rank: R, like them.
        normalized_squares, low_rank_squares: (channels,) in fp32, written.
        betas, eps: Adam's.
        workspace: memory like ``low_rank`` that may be written, or None.
    """
    exp_avg.lerp_(low_rank, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(low_rank, low_rank, value=1.0 - betas[1])
    normalized = exp_avg / (exp_avg_sq.sqrt() + eps)
    torch.sum(normalized.square(), 1, out=normalized_squares)
    torch.sum(low_rank.square(), 1, out=low_rank_squares)


def apply(parts: Sequence[ApplyPart], coefficients: Tensor, *, decay_first: bool = False, decays: bool = True) -> None:
    """W = (W + c s G) d, or W = W d + c s G with ``decay_first``.

    Args:
        parts: rectangles of weights.
        coefficients: (matrices, 2) in fp32: c and d of each matrix.
        decay_first: whether d acts on the old weight.
        decays: False where every d is 1, which saves some kernels a pass.
    """
    for weight, grad, scale, matrix, rounding in parts:
        factor, kept = coefficients[matrix].unbind()
        by = factor if scale is None else (factor * scale)[:, None]
        old = weight.float()
        new = old * kept + by * grad.float() if decay_first else (old + by * grad.float()) * kept
        write(weight, new, rounding)


def apply_rows(
    parts: Sequence[RowsPart], coefficients: Tensor, *, decay_first: bool = False, decays: bool = True
) -> None:
    """As ``apply``, for weights in INT8: each row is rounded stochastically to codes of a new scale.

    Args:
        parts: rows of weights.
        coefficients, decay_first, decays: as of ``apply``.
    """
    for codes, scales, grad, factors, block, matrix, how in parts:
        by, kept = coefficients[matrix].unbind()
        if factors is not None:
            by = by * (factors.repeat_interleave(block, output_size=len(codes))[:, None] if block else factors)
        old = dequantize(codes, scales, torch.float32)
        new = old * kept + by * grad.float() if decay_first else (old + by * grad.float()) * kept
        rows, columns = codes.shape
        bits = random_bits(how.key, how.step, how.first, rows, columns, columns, codes.device)
        new_codes, new_scales = quantize(new, scales.dtype, bits)
        codes.copy_(new_codes)
        scales.copy_(new_scales)


def adamw(
    parts: Sequence[AdamWPart],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool = False,
    decay_first: bool = False,
) -> None:
    r"""AdamW on many tensors: moments, then :math:`W = (W - c M / (\sqrt{V} + \epsilon)) d`.

    Args:
        parts: the tensors.
        coefficients: (2,) in fp32: c, which is the learning rate with Adam's bias corrections, and d.
        betas, eps: Adam's; epsilon is added outside of the bias correction.
        maximize: negate the gradients.
        decay_first: whether d acts on the old weight.
    """
    size, kept = coefficients.unbind()
    for weight, grad, *states, columns, rounding, moments in parts:
        values = -grad.float() if maximize else grad.float()
        exp_avg, exp_avg_sq = (state.float() for state in states)
        exp_avg.lerp_(values, 1.0 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(values, values, value=1.0 - betas[1])
        change = size * (exp_avg / (exp_avg_sq.sqrt() + eps))
        old = weight.float()
        new = old * kept - change if decay_first else (old - change) * kept
        _write_rows(weight, new, columns, rounding)
        for state, made, how in zip(states, (exp_avg, exp_avg_sq), moments or (None, None), strict=True):
            if made is not state:
                _write_rows(state, made, columns, how)


def _write_rows(out: Tensor, values: Tensor, columns: int, rounding: Rounding | None) -> None:
    shape = (1, -1) if rounding is None else (-1, columns)
    write(out.view(shape), values.view(shape), rounding)
