"""Update weights in INT8: rows are dequantized, updated, and rounded to codes of a new scale, in one launch.

A program has whole rows, for the new scale follows from a row's largest element. It goes over them twice, once for the
scales and once for the codes. What it reads the second time is still in the cache, so memory is read once, and nothing
is stored in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from .dtypes import DTYPES
from .rounding import random_bits, random_bits_of_eights
from .tables import blocks_on, launch, layout, rows_on

if TYPE_CHECKING:
    from ..parts import RowsPart

# Rows of a program, and how many of their elements it has at a time.
_ROWS, _COLUMNS = 4, 1024


@triton.jit
def _smallest_at_least(values, SCALE: tl.constexpr):
    """The smallest numbers of a dtype that are not less than fp32 numbers, which are 0 or larger, in that dtype."""
    if SCALE == tl.bfloat16:
        bits = (values.to(tl.int32, bitcast=True) + 0xFFFF) & -65536
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    elif SCALE == tl.float16:
        near = values.to(tl.float16)
        less = (near.to(tl.float32) < values).to(tl.int16)
        return (near.to(tl.int16, bitcast=True) + less).to(tl.float16, bitcast=True)
    else:
        return values


@triton.jit
def _updated(
    codes, grad, factors, at, k, inside, n, g_r, g_c, scale, by, kept,
    UNIT: tl.constexpr, SCALED: tl.constexpr, DECAY_FIRST: tl.constexpr,
):  # fmt: skip
    """New weights of some columns of the rows, in fp32; zeros outside of them."""
    mask = inside[:, None] & (k < n)[None, :]
    place = at[:, None] * g_r + (k[None, :] if UNIT == 2 else k[None, :] * g_c)
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(codes + at[:, None] * n + k[None, :], mask=mask, other=0).to(tl.float32) * scale[:, None]
    if SCALED == 2:
        change = (by[:, None] * tl.load(factors + k, mask=k < n, other=0.0)[None, :]) * g
    else:
        change = by[:, None] * g
    w = w * kept + change if DECAY_FIRST else (w + change) * kept
    return tl.where(mask, w, 0.0)


@triton.jit
def _apply_rows(
    programs, parts, coefficients,
    SCALE: tl.constexpr, GRAD: tl.constexpr, SCALED: tl.constexpr, DECAY_FIRST: tl.constexpr, UNIT: tl.constexpr,
    ALIGNED: tl.constexpr, EIGHTS: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = programs + tl.program_id(0) * 2
    part = parts + tl.load(program) * 15
    codes, scales = tl.load(part).to(tl.pointer_type(tl.int8)), tl.load(part + 1).to(tl.pointer_type(SCALE))
    grad, factors = tl.load(part + 2).to(tl.pointer_type(GRAD)), tl.load(part + 3).to(tl.pointer_type(tl.float32))
    matrix, rows, n = coefficients + tl.load(part + 4) * 2, tl.load(part + 5), tl.load(part + 6)
    g_r, g_c, block = tl.load(part + 7), tl.load(part + 8), tl.load(part + 9)
    k0, k1, tail = tl.load(part + 10).to(tl.uint32), tl.load(part + 11).to(tl.uint32), tl.load(part + 12).to(tl.uint32)
    step, first = tl.load(part + 13).to(tl.uint32), tl.load(part + 14)
    if ALIGNED:  # vectors of 16 bytes of gradients and of eight codes, also where a row ends
        codes, grad, n = tl.multiple_of(codes, 16), tl.multiple_of(grad, 16), tl.multiple_of(n, 8)
        g_r = tl.multiple_of(g_r, 8)
    at = tl.load(program + 1) * ROWS + tl.arange(0, ROWS)
    inside = at < rows
    old = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    by = tl.zeros([ROWS], dtype=tl.float32) + tl.load(matrix)
    kept = tl.load(matrix + 1)
    if SCALED == 1:
        by = by * tl.load(factors + at // block, mask=inside, other=0.0)
    largest = tl.zeros([ROWS], dtype=tl.float32)
    wrong = tl.zeros([ROWS], dtype=tl.int32)
    for start in range(0, n, COLUMNS):
        k = start + tl.arange(0, COLUMNS).to(tl.int64)
        w = _updated(codes, grad, factors, at, k, inside, n, g_r, g_c, old, by, kept, UNIT, SCALED, DECAY_FIRST)
        largest = tl.maximum(largest, tl.max(tl.abs(w), 1))
        wrong = tl.maximum(wrong, tl.max((w != w).to(tl.int32), 1))
    largest = tl.where(wrong > 0, float("nan"), largest)
    scale = _smallest_at_least(tl.div_rn(largest, 127.0), SCALE).to(tl.float32)
    scale = tl.where(largest > 0.0, tl.maximum(scale, TINY), scale)
    scale = tl.where(wrong > 0, float("nan"), scale)
    tl.store(scales + at, scale.to(SCALE), mask=inside)
    for start in range(0, n, COLUMNS):
        k = start + tl.arange(0, COLUMNS).to(tl.int64)
        w = _updated(codes, grad, factors, at, k, inside, n, g_r, g_c, old, by, kept, UNIT, SCALED, DECAY_FIRST)
        quotient = tl.div_rn(w, scale[:, None] + tl.zeros_like(w))
        quotient = tl.where(tl.abs(quotient) < float("inf"), quotient, 0.0)
        below = tl.floor(quotient)
        if EIGHTS:
            eights = start // 8 + tl.arange(0, COLUMNS // 8).to(tl.int64)
            bits = random_bits_of_eights(((first + at * n) >> 3)[:, None] + eights[None, :], k0, k1, step, tail)
        else:
            bits = random_bits((first + at * n)[:, None] + k[None, :], k0, k1, step, tail)
        code = below + ((quotient - below) * 65536.0 > bits.to(tl.float32) + 0.5).to(tl.float32)
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        mask = inside[:, None] & (k < n)[None, :]
        tl.store(codes + at[:, None] * n + k[None, :], code.to(tl.int8), mask=mask)


def apply_rows(
    parts: Sequence[RowsPart], coefficients: Tensor, *, decay_first: bool = False, decays: bool = True
) -> None:
    """As ``kernels.reference.apply_rows``; one launch for each kind of dtypes and memory layout."""
    alike: dict[tuple[Any, ...], list[RowsPart]] = {}
    for part in parts:
        if part.codes.numel():
            # Vectors of eight codes; what ``layout`` asks of memory in vectors of 16 bytes is more.
            unit, aligned = layout(part.grad)
            aligned = aligned and unit == 2 and layout(part.codes) == (2, True)
            scaled = 0 if part.factors is None else 1 if part.block else 2
            kind = part.scales.dtype, part.grad.dtype, scaled, unit, aligned, part.rounding.in_eights(*part.codes.shape)
            alike.setdefault(kind, []).append(part)
    for (scale, grad, scaled, unit, aligned, eights), members in alike.items():
        device = coefficients.device
        programs = blocks_on(device, tuple((len(part.codes),) for part in members), (_ROWS,))
        launch(
            _apply_rows, (len(programs),), device, partial(_cost, members),
            programs, rows_on(device, [_row(part) for part in members]), coefficients,
            SCALE=DTYPES[scale], GRAD=DTYPES[grad], SCALED=scaled, DECAY_FIRST=decay_first, UNIT=unit, ALIGNED=aligned,
            EIGHTS=eights, TINY=torch.finfo(scale).tiny, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8,
            enable_fp_fusion=False,  # as in apply.py
        )  # fmt: skip


def _row(part: RowsPart) -> list[int]:
    """The row of the table: pointers, what is a channel, extents, strides, and how codes are rounded."""
    pointers = [0 if t is None else t.data_ptr() for t in (part.codes, part.scales, part.grad, part.factors)]
    how = part.rounding
    return [*pointers, part.matrix, *part.codes.shape, *part.grad.stride(), part.block, *how.key, how.step, how.first]


def _cost(parts: Sequence[RowsPart]) -> Cost:
    written = sum(part.codes.nbytes + part.scales.nbytes for part in parts)
    read = written + sum(part.grad.nbytes + (0 if part.factors is None else part.factors.nbytes) for part in parts)
    # Both passes update; the second one divides, and rounds with an eighth of a call of Philox.
    return Cost("apply_rows", read, written, other=sum(part.codes.numel() * 40 for part in parts))
