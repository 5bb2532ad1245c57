"""Stochastic rounding in Triton's kernels equals the torch code to the bit, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import pytest
import torch

from apollo_dist.kernels.rounding import key_of, random_bits

pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
import triton
import triton.language as tl

from apollo_dist.kernels.triton import rounding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = key_of(3, "layers.0.weight")


@triton.jit
def _write(key, one, eights, first, N: tl.constexpr):
    k0, k1, tail = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32), tl.load(key + 2).to(tl.uint32)
    step = tl.load(key + 3).to(tl.uint32)
    index = first + tl.arange(0, N).to(tl.int64)
    tl.store(one + tl.arange(0, N), rounding.random_bits(index, k0, k1, step, tail))
    call = (first >> 3) + tl.arange(0, N // 8).to(tl.int64)
    tl.store(eights + tl.arange(0, N), rounding.random_bits_of_eights(call, k0, k1, step, tail))


@pytest.mark.parametrize("first", [0, 8, (1 << 36) + 8])
def test_bits_are_the_same(first):
    want = random_bits(KEY, 7, first, 1, 64, 64, DEVICE)[0]
    one, eights = torch.zeros_like(want), torch.zeros_like(want)
    _write[(1,)](torch.tensor([*KEY, 7], device=DEVICE), one, eights, first, N=64)
    assert torch.equal(one, want)
    assert torch.equal(eights, want)
