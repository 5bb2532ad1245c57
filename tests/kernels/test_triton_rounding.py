"""Stochastic rounding in Triton's kernels equals the torch code to the bit, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import pytest
import torch

from apollo_dist.kernels import reference
from apollo_dist.kernels.parts import AdamWPart, ApplyPart
from apollo_dist.kernels.rounding import Rounding, key_of, random_bits

pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
import triton
import triton.language as tl

from apollo_dist.kernels import triton as kernels
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


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# (rows, columns, first row, first column) in a matrix of so many columns: in eights of neighbours, and not.
TILES = [(40, [(9, 40, 0, 0), (5, 16, 3, 8), (5, 9, 3, 8), (1, 17, 2, 16)]), (1031, [(3, 1031, 0, 0), (2, 8, 1, 1)])]


@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay_first", [False, True])
def test_apply_is_bit_equal(grads, decay_first):
    """By rows and by columns, with memory in either order."""
    coefficients = torch.tensor([[-0.1, 1.0], [-0.3, 0.875]], device=DEVICE)
    sides = []
    for _ in range(2):
        parts = []
        for n, tiles in TILES:
            for number, (height, width, row, column) in enumerate(tiles):
                for turned in (False, True):
                    weight = normal(height, width, dtype=torch.bfloat16, seed=number)
                    grad, scale = normal(height, width, dtype=grads, seed=1), normal(1100, seed=2).abs()
                    how = Rounding(KEY, 3 + number, row * n + column, (n, 1))
                    if turned:
                        weight, grad, how = weight.t(), grad.t(), how._replace(strides=(1, n))
                    by = scale[: weight.shape[0]] if number % 2 else None
                    parts.append(ApplyPart(weight, grad, by, number % 2, how))
        sides.append(parts)
    kernels.apply(sides[0], coefficients, decay_first=decay_first)
    reference.apply(sides[1], coefficients, decay_first=decay_first)
    for got, want in zip(*sides, strict=True):
        assert torch.equal(got.weight, want.weight), (got.weight.shape, got.rounding)


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_is_bit_equal(weights, states):
    """Tensors in one piece, and rows of a wider one, in eights and not."""
    coefficients, sides = torch.tensor([0.1, 0.75], device=DEVICE), []
    for _ in range(2):
        parts = []
        for count, columns, first, stride in [
            (4100, 4100, 0, 4100), (4100, 4100, 3, 4100), (320, 16, 8, 40), (320, 16, 4, 40), (27, 9, 0, 40),
        ]:  # fmt: skip
            tensors = normal(count, dtype=weights), normal(count, seed=1, dtype=torch.bfloat16)
            moments = normal(count, seed=2, dtype=states), normal(count, seed=3).square().to(states)
            hows = [Rounding(key_of(3, "a", name), 9, first, (stride, 1)) for name in ("weight", "m", "v")]
            how = hows[0] if weights == torch.bfloat16 else None
            parts.append(
                AdamWPart(*tensors, *moments, columns, how, tuple(hows[1:]) if states == torch.bfloat16 else None)
            )
        sides.append(parts)
    for function, parts in zip((kernels.adamw, reference.adamw), sides, strict=True):
        function(parts, coefficients, betas=(0.9, 0.999), eps=1e-6)
    # Sums of the moments in fp32 round differently once; a rounding to bf16 then differs once in tens of thousands.
    for got, want in zip(*sides, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "weight"):
            one, other = getattr(got, name), getattr(want, name)
            if one.dtype == torch.bfloat16:
                assert int((one != other).sum()) <= 1, (name, got.columns, got.rounding)
            else:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
