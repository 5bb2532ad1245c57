"""Stochastic rounding to bf16 inside of kernels, with the bits of ``kernels.rounding``, and no temporary of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_bits(index, k0, k1, step, tail):
    """Random bits of elements, in int32, from their indices in the whole matrix, in int64; a call of Philox for each.

    The key and counter words and the step are uint32.
    """
    call = index >> 3
    low = (call & 0xFFFFFFFF).to(tl.uint32)
    high = (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(low, high, low * 0 + step, low * 0 + tail, k0, k1)
    place = (index & 7).to(tl.int32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    return ((word >> ((place & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def random_bits_of_eights(call, k0, k1, step, tail):
    """The same of eight neighbours along the last dimension for each call, (..., 8 n) from (..., n): one call for all.

    The first index of the eight is 8 times the call.
    """
    low = (call & 0xFFFFFFFF).to(tl.uint32)
    high = (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(low, high, low * 0 + step, low * 0 + tail, k0, k1)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave((words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32))


@triton.jit
def rounded(values, bits):
    """fp32 numbers as bf16, rounded with those bits; infinities and NaN as they are."""
    cut = ((values.to(tl.int32, bitcast=True) + bits) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), cut, values).to(tl.bfloat16)
