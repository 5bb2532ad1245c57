"""Projections and norms of channels-first gradients: one read of the gradient each."""

from __future__ import annotations

import torch
from torch import Tensor


def as_gemm_operand(projection: Tensor) -> Tensor:
    """P^T of projections P, (..., r, size), as ``project`` takes it: (..., size, r); r = 1 on CPU gives (..., size, 2).

    A single column gets a zero beside it, since BLAS takes less than half the time for two, unless memory is the
    limit. Several are copied, so that a row of P^T lies in one piece, which BLAS multiplies with a little faster.
    """
    if projection.device.type != "cpu":
        return projection.mT
    if projection.shape[-2] == 1:
        return torch.cat([projection, torch.zeros_like(projection)], dim=-2).mT
    return projection.mT.contiguous()


def project(grad: Tensor, columns: Tensor, out: Tensor, alpha: float) -> None:
    """The low-rank gradient alpha G P^T of a channels-first gradient; written to ``out``, (channels, r)."""
    if out.shape[1] > 1:
        out.addmm_(grad, columns, beta=0, alpha=alpha)
    elif columns.shape[1] == 1 or grad.stride(1) != 1:
        out[:, 0].addmv_(grad, columns[:, 0], beta=0, alpha=alpha)
    elif alpha == 1.0:  # as it is at rank 1; to copy is the least
        out.copy_(torch.mm(grad, columns)[:, :1])
    else:
        torch.mul(torch.mm(grad, columns)[:, :1], alpha, out=out)


def channel_norms(grad: Tensor, out: Tensor) -> None:
    """The norm of each row of a channels-first gradient; written to ``out``, (channels,)."""
    if grad.device.type == "cpu" and grad.stride(0) == 1 and grad.stride(1) != 1:
        # A wide matrix comes transposed. torch reduces over its strided dimension without vectorizing; sums of squares
        # over blocks of rows that stay in the cache are several times faster.
        blocks = torch.split(grad.t(), 128)
        squares = blocks[0].square()
        for block in blocks[1:]:
            squares[: block.shape[0]].addcmul_(block, block)
        torch.sum(squares, 0, out=out).sqrt_()
    else:
        torch.linalg.vector_norm(grad, dim=1, out=out)


def line_norms(grad: Tensor) -> Tensor:
    """The norms of a gradient's rows, or of its columns where those lie one after the other: the faster ones.

    In fp32 at least.
    """
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    lines: Tensor = torch.linalg.vector_norm(grad, dim=1 if grad.stride(1) == 1 else 0, dtype=wide)
    return lines
