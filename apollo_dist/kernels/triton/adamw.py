"""AdamW on many flat tensors in one launch: weights and moments in their own dtypes, no copy of either."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from .dtypes import DTYPES
from .rounding import random_bits, random_bits_of_eights, rounded
from .tables import BYTES, EIGHT, blocks_on, launch, rows_on

if TYPE_CHECKING:
    from ..parts import AdamWPart

# Elements of one program.
_BLOCK = 4096


@triton.jit
def _bits(row, key, EIGHTS: tl.constexpr, FLAT: tl.constexpr, block, BLOCK: tl.constexpr):
    """The random bits of a block's elements, with the key and counter words that begin at ``key`` of the row."""
    k0, k1 = tl.load(row + key).to(tl.uint32), tl.load(row + key + 1).to(tl.uint32)
    tail, step = tl.load(row + key + 2).to(tl.uint32), tl.load(row + 8).to(tl.uint32)
    if EIGHTS:
        at = block * BLOCK + tl.arange(0, BLOCK // 8) * 8
    else:
        at = block * BLOCK + tl.arange(0, BLOCK)
    columns, index = tl.load(row + 5), tl.load(row + 6) + at
    if not FLAT:
        index += (at // columns) * (tl.load(row + 7) - columns)
    if EIGHTS:
        return random_bits_of_eights(index >> 3, k0, k1, step, tail)
    else:
        return random_bits(index, k0, k1, step, tail)


@triton.jit
def _adamw(
    programs, tensors, coefficients, beta1, beta2, first, second, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, SIGN: tl.constexpr, DECAY_FIRST: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr, ROUND_STATE: tl.constexpr, EIGHTS: tl.constexpr, FLAT: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = programs + tl.program_id(0) * 2
    row = tensors + tl.load(program) * (18 if ROUND_WEIGHT or ROUND_STATE else 5)
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(STATE))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(STATE))
    block, numel = tl.load(program + 1), tl.load(row + 4)
    if ALIGNED:  # vectors of 16 bytes, also where the mask ends
        weight, grad, numel = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(numel, 8)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    size, kept = tl.load(coefficients), tl.load(coefficients + 1)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * SIGN
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32) * beta1 + g * first
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0).to(tl.float32) * beta2 + g * g * second
    change = size * (m / (tl.sqrt(v) + eps))
    w = w * kept - change if DECAY_FIRST else (w - change) * kept
    if ROUND_STATE:
        tl.store(exp_avg + at, rounded(m, _bits(row, 12, EIGHTS, FLAT, block, BLOCK)), mask=mask)
        tl.store(exp_avg_sq + at, rounded(v, _bits(row, 15, EIGHTS, FLAT, block, BLOCK)), mask=mask)
    else:
        tl.store(exp_avg + at, m.to(STATE), mask=mask)
        tl.store(exp_avg_sq + at, v.to(STATE), mask=mask)
    if ROUND_WEIGHT:
        tl.store(weight + at, rounded(w, _bits(row, 9, EIGHTS, FLAT, block, BLOCK)), mask=mask)
    else:
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
    """As ``kernels.reference.adamw``; one launch for each kind of dtypes and roundings."""
    alike: dict[tuple[Any, ...], list[AdamWPart]] = {}
    for part in parts:
        if part.weight.numel():
            kind = part.weight.dtype, part.grad.dtype, part.exp_avg.dtype, _aligned(part)
            alike.setdefault((*kind, part.rounding is not None, part.moments is not None, *_rows(part)), []).append(
                part
            )
    for (weight, grad, state, aligned, of_weight, of_state, eights, flat), members in alike.items():
        device = coefficients.device
        tensors = [_row(part) for part in members]
        programs = blocks_on(device, tuple((part.weight.numel(),) for part in members), (_BLOCK,))
        launch(
            _adamw, (len(programs),), device, partial(_cost, members),
            programs, rows_on(device, tensors), coefficients,
            betas[0], betas[1], 1.0 - betas[0], 1.0 - betas[1], eps,
            WEIGHT=DTYPES[weight], GRAD=DTYPES[grad], STATE=DTYPES[state], SIGN=-1.0 if maximize else 1.0,
            DECAY_FIRST=decay_first, ROUND_WEIGHT=of_weight, ROUND_STATE=of_state, EIGHTS=eights, FLAT=flat,
            ALIGNED=aligned, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,  # as in apply.py
        )  # fmt: skip


def _aligned(part: AdamWPart) -> bool:
    """Whether vectors of eight elements are aligned, and either inside of the tensors or outside."""
    return part.weight.numel() % EIGHT == 0 and all(tensor.data_ptr() % BYTES == 0 for tensor in part[:4])


def _rows(part: AdamWPart) -> tuple[bool, bool]:
    """Whether eight neighbours are those of one call of Philox, and whether the elements are one row."""
    how = part.rounding if part.moments is None else part.moments[0]
    if how is None:
        return False, False
    rows = part.weight.numel() // part.columns
    return how.in_eights(rows, part.columns) and (rows == 1 or part.columns % 8 == 0), rows == 1


def _row(part: AdamWPart) -> list[int]:
    """The row of the table: pointers, length, and how it is rounded."""
    row = [t.data_ptr() for t in (part.weight, part.grad, part.exp_avg, part.exp_avg_sq)]
    row.append(part.weight.numel())
    how = part.rounding if part.moments is None else part.moments[0]
    if how is None:
        return row
    keys = [(0, 0, 0) if one is None else one.key for one in (part.rounding, *(part.moments or (None, None)))]
    return [*row, part.columns, how.first, how.strides[0], how.step, *(word for key in keys for word in key)]


def _cost(parts: Sequence[AdamWPart]) -> Cost:
    written = sum(part.weight.nbytes + part.exp_avg.nbytes + part.exp_avg_sq.nbytes for part in parts)
    read = written + sum(part.grad.nbytes for part in parts)
    # A call of Philox is some 70 integer operations, and mostly serves eight elements.
    work = sum(
        part.weight.numel() * (15 + 16 * (part.rounding is not None) + 32 * (part.moments is not None))
        for part in parts
    )
    return Cost("adamw", read, written, other=work)
