"""The quantizer of INT8 weights."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_dist.kernels.quantizer import LARGEST, dequantize, quantize
from apollo_dist.kernels.rounding import key_of, random_bits
from apollo_dist.weights.int8 import Int8Rows, quantize_again


def bits_of(rows, columns, step=1):
    return random_bits(key_of(0, "w"), step, 0, rows, columns, columns)


def test_codes_are_unbiased_and_nothing_is_cut_off():
    """The mean of 4,000 roundings is the weight to 5 sigma of a code's variance, at most 1/4, also of the largest."""
    torch.manual_seed(0)
    values = torch.randn(3, 16)
    trials = 4000
    total = torch.zeros(3, 16, dtype=torch.float64)
    for step in range(trials):
        codes, scale = quantize(values, torch.bfloat16, bits_of(3, 16, step))
        total += dequantize(codes, scale, torch.float64)
    codes, scale = quantize(values, torch.bfloat16)
    assert (values.abs() <= LARGEST * scale.float()[:, None]).all()
    off = (total / trials - values).abs() / scale.double()[:, None]
    assert off.max() < 5 * 0.5 / trials**0.5
    nearest = (dequantize(codes, scale, torch.float32) - values).abs() / scale.float()[:, None]
    assert 0.45 < nearest.max() <= 0.5 + 1e-5


def test_scales_are_the_smallest_that_keep_the_largest_element():
    values = torch.rand(500, 4) + 0.1
    _, scale = quantize(values, torch.bfloat16)
    below = torch.nextafter(scale, torch.zeros_like(scale))
    largest = values.amax(1) / LARGEST
    assert (scale.float() >= largest).all() and (below.float() < largest).all()


def test_rows_of_zeros_and_rows_that_are_not_finite():
    values = torch.ones(5, 4)
    values[0], values[2, 1], values[3, 0], values[4] = 0.0, torch.nan, torch.inf, 1e-42
    for dtype in (torch.bfloat16, torch.float32):
        for bits in (None, bits_of(5, 4)):
            found = dequantize(*quantize(values, dtype, bits), torch.float32)
            assert (found[0] == 0).all() and torch.allclose(found[1], values[1], atol=0.01)
            assert found[2].isnan().all() and found[3].isnan().all() and found[4].isfinite().all()


class ByTensors(TorchDispatchMode):
    """Raises where something is divided by a number, which CUDA does with the number's rounded reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.div:
            assert all(isinstance(each, torch.Tensor) for each in args[:2])
        return func(*args, **(kwargs or {}))


def test_every_quotient_is_rounded_once_on_every_device():
    values = torch.rand(3, 4)
    with pytest.raises(AssertionError), ByTensors():
        values / 127
    with ByTensors():
        quantize(values, torch.bfloat16, bits_of(3, 4))
        quantize_again(values, torch.float32)


def test_weights_from_int8_and_back_are_the_same():
    torch.manual_seed(0)
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        values = torch.randn(200, 33, dtype=wide)
        codes, scale = quantize(values, dtype, bits_of(200, 33))
        again = quantize_again(dequantize(codes, scale, wide), dtype)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scale)
    other, expected = quantize_again(values, torch.float64), quantize(values, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_windows_write_what_is_left_in_them():
    """In pieces of any size the same codes, of rows that begin anywhere in the matrix."""
    torch.manual_seed(0)
    whole = quantize(torch.randn(10, 7), torch.bfloat16)
    expected = None
    for multiple in (1, 2, 5):
        codes, scale = (each.clone() for each in whole)
        for first, last in ((0, 4), (4, 10)):
            here = codes[first:last], scale[first:last]
            rows = Int8Rows(lambda here=here: here, "w", (last - first, 7), first * 7, seed=3)
            for _, values in rows.windows(2, torch.float32, multiple):
                values.mul_(1.01).add_(0.003)
        expected = (codes, scale) if expected is None else expected
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
    assert not torch.equal(codes, whole[0])
