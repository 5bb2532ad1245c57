"""Moments and the norms that scaling factors are made of: R, M and V in one pass; N is never written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from .tables import launch

# Channels of a program: with 256 columns, eight rows of 1 KB each.
_ROWS, _COLUMNS = 8, 256


@triton.jit
def _moments(
    exp_avg, exp_avg_sq, low_rank, n_squares, r_squares, channels, rank, beta1, beta2, first, second, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_sum = tl.zeros([ROWS], dtype=tl.float32)
    r_sum = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, rank, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = (rows < channels)[:, None] & (columns < rank)[None, :]
        at = rows.to(tl.int64)[:, None] * rank + columns[None, :]
        r = tl.load(low_rank + at, mask=mask, other=0.0)
        m = tl.load(exp_avg + at, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
        m = m * beta1 + r * first
        v = v * beta2 + r * r * second
        tl.store(exp_avg + at, m, mask=mask)
        tl.store(exp_avg_sq + at, v, mask=mask)
        n = tl.where(mask, m / (tl.sqrt(v) + eps), 0.0)
        n_sum += tl.sum(n * n, 1)
        r_sum += tl.sum(r * r, 1)
    tl.store(n_squares + rows, n_sum, mask=rows < channels)
    tl.store(r_squares + rows, r_sum, mask=rows < channels)


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
    channels, rank = low_rank.shape
    if not channels:
        return
    columns = min(_COLUMNS, triton.next_power_of_2(rank))
    rows = _ROWS * (_COLUMNS // columns)  # as many elements a program whatever the rank
    read, written = 3 * low_rank.nbytes, 2 * low_rank.nbytes + 8 * channels
    launch(
        _moments, (triton.cdiv(channels, rows),), low_rank.device,
        lambda: Cost("moments", read, written, other=14 * low_rank.numel()),
        exp_avg, exp_avg_sq, low_rank, normalized_squares, low_rank_squares, channels, rank,
        betas[0], betas[1], 1.0 - betas[0], 1.0 - betas[1], eps, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
