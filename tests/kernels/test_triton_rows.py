"""INT8 weights in Triton's kernel equal the torch code to the bit, in Triton's interpreter where no GPU is."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from apollo_dist.kernels import reference
from apollo_dist.kernels.parts import RowsPart
from apollo_dist.kernels.quantizer import quantize
from apollo_dist.kernels.rounding import Rounding, key_of, random_bits

pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
from apollo_dist.kernels import triton as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KEY = key_of(3, "layers.0.weight")
# Rows, columns, rows of a channel (0: columns are channels, -1: no factors), first row; rows in eights and not.
SHAPES = [(9, 40, 1, 0), (1, 1031, 1, 3), (7, 13, 0, 2), (6, 24, 3, 0), (5, 1, 1, 0), (1, 16, 0, 8), (4, 2056, -1, 1)]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def part(shape, number, scales, grads, *, turned=False):
    rows, columns, block, first = shape
    codes, scale = quantize(normal(rows, columns, seed=number), scales)
    memory = torch.cat([codes, codes.new_full((1, columns), 77)])  # with a row behind it, where nothing may be written
    grad = normal(columns, rows, dtype=grads, seed=7).t() if turned else normal(rows, columns, dtype=grads, seed=7)
    channels = columns if block == 0 else rows // block
    factors = None if block < 0 else normal(channels, seed=8).abs()
    how = Rounding(KEY, 3 + number, first * columns, (columns, 1))
    return memory, RowsPart(memory[:rows], scale, grad, factors, max(block, 0), number % 2, how)


KINDS = [(*dtypes, False) for dtypes in product(DTYPES, DTYPES)] + [(torch.bfloat16, torch.bfloat16, True)]


@pytest.mark.parametrize(("scales", "grads", "decay_first"), KINDS, ids=str)
def test_codes_and_scales_are_bit_equal(scales, grads, decay_first):
    coefficients = torch.tensor([[-0.01, 1.0], [-0.03, 0.875]], device=DEVICE)
    sides = [
        [part(shape, i, scales, grads, turned=turned) for i, shape in enumerate(SHAPES) for turned in (False, True)]
        for _ in range(2)
    ]
    kernels.apply_rows([each for _, each in sides[0]], coefficients, decay_first=decay_first)
    reference.apply_rows([each for _, each in sides[1]], coefficients, decay_first=decay_first)
    for (memory, got), (_, want), shape in zip(*sides, [s for s in SHAPES for _ in range(2)], strict=True):
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales), shape
        assert bool((memory[-1] == 77).all())
        assert got.codes.unique().numel() > 1 or got.codes.numel() == 1


def test_codes_are_those_of_float64():
    """One that rounding in fp32 moves across its random number differs by one: a few in 1e5 elements."""
    rows, columns = 64, 2048
    codes, scale = quantize(normal(rows, columns), torch.float32)
    grad, factors = normal(rows, columns, seed=1), normal(rows, seed=2).abs()
    new = (codes.double() * scale.double()[:, None] - 0.01 * factors.double()[:, None] * grad.double()) * 0.875
    expected = new.abs().amax(1) / 127
    quotient = new / expected[:, None]
    bits = random_bits(KEY, 5, 0, rows, columns, columns, DEVICE)
    wanted = quotient.floor() + ((quotient - quotient.floor()) * 65536 > bits + 0.5)
    how = Rounding(KEY, 5, 0, (columns, 1))
    kernels.apply_rows(
        [RowsPart(codes, scale, grad, factors, 1, 0, how)], torch.tensor([[-0.01, 0.875]], device=DEVICE)
    )
    assert torch.allclose(scale.double(), expected, rtol=3e-7)
    off = (codes.double() - wanted).abs()
    assert off.max() <= 1 and off.sum() < 40


@pytest.mark.parametrize("scales", DTYPES, ids=str)
def test_rows_of_zeros_and_rows_that_are_no_ordinary_numbers(scales):
    rows, columns = 9, 24
    sides = []
    for _ in range(2):
        weights, grad = normal(rows, columns), torch.zeros(rows, columns, device=DEVICE)
        weights[0] = 0.0
        grad[1, 3], grad[2, 3], grad[3, 3] = torch.inf, -torch.inf, torch.nan
        weights[4], grad[4] = 0.0, 1e-41  # a scale below the smallest normal number
        grad[5], grad[6] = 1e38, -3e38
        codes, scale = quantize(weights, scales)
        scale[7] = torch.inf
        sides.append(RowsPart(codes, scale, grad, None, 0, 0, Rounding(KEY, 1, 0, (columns, 1))))
    coefficients = torch.tensor([[1.0, 1.0]], device=DEVICE)
    kernels.apply_rows([sides[0]], coefficients)
    reference.apply_rows([sides[1]], coefficients)
    assert torch.equal(sides[0].codes, sides[1].codes)
    assert torch.equal(sides[0].scales.nan_to_num(9.0), sides[1].scales.nan_to_num(9.0))
    assert bool(sides[0].scales[3].isnan())


def test_nothing_is_done_where_nothing_is():
    empty = torch.zeros((0, 8), dtype=torch.int8, device=DEVICE)
    how = Rounding(KEY, 1, 0, (8, 1))
    kernels.apply_rows(
        [RowsPart(empty, torch.zeros(0, device=DEVICE), torch.zeros((0, 8), device=DEVICE), None, 0, 0, how)],
        torch.ones((1, 2), device=DEVICE),
    )
