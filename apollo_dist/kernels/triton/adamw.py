"""AdamW on many flat tensors in one launch: weights in their own dtype, fp32 moments, no copy of either."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from .dtypes import DTYPES
from .tables import blocks_on, launch, rows_on

if TYPE_CHECKING:
    import torch

    from ..parts import AdamWPart

# Elements of one program.
_BLOCK = 4096


@triton.jit
def _adamw(
    programs, tensors, coefficients, beta1, beta2, first, second, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, SIGN: tl.constexpr, DECAY_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = programs + tl.program_id(0) * 2
    row = tensors + tl.load(program) * 5
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    at = tl.load(program + 1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(row + 4)
    size, kept = tl.load(coefficients), tl.load(coefficients + 1)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * SIGN
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask, other=0.0) * beta1 + g * first
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0) * beta2 + g * g * second
    change = size * (m / (tl.sqrt(v) + eps))
    w = w * kept - change if DECAY_FIRST else (w - change) * kept
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    tl.store(weight + at, w.to(WEIGHT), mask=mask)


def adamw(
    parts: Sequence[AdamWPart],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool = False,
    decay_first: bool = False,
) -> None:
    """As ``kernels.reference.adamw``; one launch for each pair of dtypes."""
    alike: dict[tuple[torch.dtype, torch.dtype], list[AdamWPart]] = {}
    for part in parts:
        if part.weight.numel():
            alike.setdefault((part.weight.dtype, part.grad.dtype), []).append(part)
    for (weight, grad), members in alike.items():
        device = coefficients.device
        tensors = [[*(t.data_ptr() for t in part), part.weight.numel()] for part in members]
        programs = blocks_on(device, tuple((row[-1],) for row in tensors), (_BLOCK,))
        launch(
            _adamw, (len(programs),), device, partial(_cost, members),
            programs, rows_on(device, tensors), coefficients,
            betas[0], betas[1], 1.0 - betas[0], 1.0 - betas[1], eps,
            WEIGHT=DTYPES[weight], GRAD=DTYPES[grad], SIGN=-1.0 if maximize else 1.0, DECAY_FIRST=decay_first,
            BLOCK=_BLOCK,
        )  # fmt: skip


def _cost(parts: Sequence[AdamWPart]) -> Cost:
    written = sum(part.weight.nbytes + part.exp_avg.nbytes + part.exp_avg_sq.nbytes for part in parts)
    read = written + sum(part.grad.nbytes for part in parts)
    return Cost("adamw", read, written, other=15 * sum(part.weight.numel() for part in parts))
