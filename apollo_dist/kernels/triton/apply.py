"""Update weights with scaled gradients: one read of each, one write of the weight, no fp32 copy of either."""

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
from .tables import blocks_on, launch, layout, rows_on

if TYPE_CHECKING:
    from ..parts import ApplyPart
    from ..rounding import Rounding

# Elements of a program across and along the direction in which memory is contiguous.
_ACROSS, _ALONG = 8, 1024


@triton.jit
def _apply(
    programs, parts, coefficients,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, DECAY_FIRST: tl.constexpr,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, UNIT: tl.constexpr, ALONG: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    program = programs + tl.program_id(0) * 3
    row = parts + tl.load(program) * (16 if ALONG else 10)
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    channels, inner = tl.load(row + 4), tl.load(row + 5)
    w_c, w_k, g_c, g_k = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
    if ALIGNED:  # vectors of 16 bytes, also where a mask ends
        weight, grad = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16)
        if UNIT == 1:
            channels, w_k, g_k = tl.multiple_of(channels, 8), tl.multiple_of(w_k, 8), tl.multiple_of(g_k, 8)
        else:
            inner, w_c, g_c = tl.multiple_of(inner, 8), tl.multiple_of(w_c, 8), tl.multiple_of(g_c, 8)
    c = tl.load(program + 1) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.load(program + 2) * INNER + tl.arange(0, INNER)
    mask = (c < channels)[:, None] & (k < inner)[None, :]
    # UNIT says which stride is known to be 1, so that the compiler sees it: 0 none, 1 the channels', 2 the inner one.
    if UNIT == 1:
        w_at = c[:, None] + k[None, :] * w_k
        g_at = c[:, None] + k[None, :] * g_k
    elif UNIT == 2:
        w_at = c[:, None] * w_c + k[None, :]
        g_at = c[:, None] * g_c + k[None, :]
    else:
        w_at = c[:, None] * w_c + k[None, :] * w_k
        g_at = c[:, None] * g_c + k[None, :] * g_k
    matrix = coefficients + tl.load(row + 3) * 2
    by, kept = tl.zeros([CHANNELS], dtype=tl.float32) + tl.load(matrix), tl.load(matrix + 1)
    if SCALED:
        scale = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        by = by * tl.load(scale + c, mask=c < channels, other=0.0)
    w = tl.load(weight + w_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + g_at, mask=mask, other=0.0).to(tl.float32)
    change = by[:, None] * g
    w = w * kept + change if DECAY_FIRST else (w + change) * kept
    if ALONG:
        # ALONG says in which direction an element's index in the whole matrix grows by 1, as UNIT does for memory.
        k0, k1, tail = tl.load(row + 10).to(tl.uint32), tl.load(row + 11).to(tl.uint32), tl.load(row + 12).to(tl.uint32)
        step, first, stride = tl.load(row + 13).to(tl.uint32), tl.load(row + 14), tl.load(row + 15)
        if ALONG == 1:
            if EIGHTS:
                eights = tl.load(program + 1) * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
                call = ((first + k * stride) >> 3)[:, None] + eights[None, :]
                bits = tl.trans(random_bits_of_eights(call, k0, k1, step, tail))
            else:
                bits = random_bits(first + c[:, None] + (k * stride)[None, :], k0, k1, step, tail)
        else:
            if EIGHTS:
                eights = tl.load(program + 2) * (INNER // 8) + tl.arange(0, INNER // 8)
                call = ((first + c * stride) >> 3)[:, None] + eights[None, :]
                bits = random_bits_of_eights(call, k0, k1, step, tail)
            else:
                bits = random_bits(first + (c * stride)[:, None] + k[None, :], k0, k1, step, tail)
        tl.store(weight + w_at, rounded(w, bits), mask=mask)
    else:
        tl.store(weight + w_at, w.to(WEIGHT), mask=mask)


def apply(parts: Sequence[ApplyPart], coefficients: Tensor, *, decay_first: bool = False, decays: bool = True) -> None:
    """As ``kernels.reference.apply``; one launch for each kind of dtypes and memory layout."""
    alike: dict[tuple[Any, ...], list[ApplyPart]] = {}
    for part in parts:
        if part.weight.numel():
            unit, aligned = layout(part.weight, part.grad)
            along = 0 if part.rounding is None else 2 if part.rounding.strides[1] == 1 else 1
            eights = part.rounding is not None and part.rounding.in_eights(*part.weight.shape)
            key = (part.weight.dtype, part.grad.dtype, part.scale is not None, aligned, unit, along, eights)
            alike.setdefault(key, []).append(part)
    for (weight, grad, scaled, aligned, unit, along, eights), members in alike.items():
        channels, inner = (_ALONG, _ACROSS) if unit == 1 else (_ACROSS, _ALONG)
        rows = [
            [
                w.data_ptr(), g.data_ptr(), 0 if s is None else s.data_ptr(), matrix, *w.shape,
                *w.stride(), *g.stride(), *(() if how is None else _words(how)),
            ]
            for w, g, s, matrix, how in members
        ]  # fmt: skip
        device = coefficients.device
        programs = blocks_on(device, tuple(tuple(part.weight.shape) for part in members), (channels, inner))
        launch(
            _apply, (len(programs),), device, partial(_cost, members),
            programs, rows_on(device, rows), coefficients,
            WEIGHT=DTYPES[weight], GRAD=DTYPES[grad], SCALED=scaled, ALIGNED=aligned, DECAY_FIRST=decay_first,
            CHANNELS=channels, INNER=inner, UNIT=unit, ALONG=along, EIGHTS=eights, num_warps=8,
            enable_fp_fusion=False,  # so that a weight is rounded alike in every variant, and as by torch's operations
        )  # fmt: skip


def _words(how: Rounding) -> tuple[int, ...]:
    """What a row of the table says of a rounding: key, step, first index, and the stride that is not known to be 1."""
    stride, along = how.strides
    return *how.key, how.step, how.first, stride if along == 1 else along


def _cost(parts: Sequence[ApplyPart]) -> Cost:
    written = sum(part.weight.nbytes for part in parts)
    read = written + sum(part.grad.nbytes + (0 if part.scale is None else part.scale.nbytes) for part in parts)
    # A call of Philox is some 70 integer operations, and mostly serves eight elements.
    work = sum(part.weight.numel() * (4 if part.rounding is None else 20) for part in parts)
    return Cost("apply", read, written, other=work)
