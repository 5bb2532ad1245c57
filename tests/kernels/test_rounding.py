"""Stochastic rounding to bf16: without bias, and a function of an element's place alone."""

from __future__ import annotations

import math

import pytest
import torch

from apollo_dist.kernels.philox import philox_4x32_10, words_of
from apollo_dist.kernels.rounding import Rounding, key_of, random_bits, round_into

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = key_of(3, "layers.0.weight")


def rounded(values, step=7, first=0, strides=None):
    out = torch.full_like(values, 7.0, dtype=torch.bfloat16)
    round_into(out, values, Rounding(KEY, step, first, strides or (values.shape[1], 1)))
    return out


@pytest.mark.parametrize("value", [1.0 + 2.0**-9, -3.1, 1e-40, 5e30])
def test_the_mean_of_many_roundings_is_the_number(value):
    """Each is one of the two neighbours; the mean of 10^5 lies within 4 standard deviations."""
    count = 100_000
    exact = torch.tensor(value)
    below = (exact.view(torch.int32) & -65536).view(torch.float32)
    above = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert below.abs() < exact.abs() < above.abs()
    found = rounded(torch.full((count // 50, 50), value)).double()
    assert set(found.unique().tolist()) == {float(below), float(above)}
    probability = (exact.double() - below.double()) / (above.double() - below.double())
    sigma = float((above.double() - below.double()).abs()) * math.sqrt(float(probability * (1 - probability)) / count)
    assert abs(float(found.mean()) - float(exact.double())) < 4 * sigma


def test_bits_are_uniform_and_differ_by_step_name_seed_and_stream():
    whole = random_bits(KEY, 7, 0, 300, 300, 300).double()
    others = [
        random_bits(key, step, 0, 300, 300, 300).double()
        for key, step in (
            (KEY, 8),
            (key_of(4, "layers.0.weight"), 7),
            (key_of(3, "layers.1.weight"), 7),
            (key_of(3, "layers.0.weight", "exp_avg"), 7),
        )
    ]
    uniform = 65536 / math.sqrt(12)
    assert abs(float(whole.mean()) - 32767.5) < 4 * uniform / 300
    assert float(whole.std()) == pytest.approx(uniform, rel=0.01)
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([whole.view(-1), other.view(-1)]))[0, 1])) < 4 / 300


def test_one_call_of_philox_makes_the_bits_of_eight_elements():
    """By the plain code of Philox, also where the index needs more than 32 bits."""
    words = words_of("apollo_dist rounding\x003\0weight\0layers.0.weight")
    assert words[:3] == KEY
    for first in (0, 8 * 1000 + 3, (1 << 36) + 5):
        found = random_bits(KEY, 7, first, 1, 20, 20)[0]
        for i in range(20):
            call, place = divmod(first + i, 8)
            counter = tuple(torch.tensor([word]) for word in (call & 0xFFFFFFFF, call >> 32, 7, KEY[2]))
            word = int(philox_4x32_10(counter, (torch.tensor([KEY[0]]), torch.tensor([KEY[1]])))[place // 2])
            assert int(found[i]) == (word >> 16 * (place % 2)) & 0xFFFF


@pytest.mark.parametrize("shape", [(13, 29), (16, 24), (1, 40), (40, 1)])
def test_a_part_is_rounded_as_in_the_whole(shape, monkeypatch):
    """Rows, columns, rectangles, transposed, and however much is rounded at a time."""
    m, n = shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = rounded(values)
    assert not torch.equal(whole, values.bfloat16())
    for limit in (1 << 16, 10):
        monkeypatch.setattr("apollo_dist.kernels.rounding._ELEMENTS", {"cpu": limit})
        for row, column, height, width in (
            (0, 0, m, n),
            (m // 2, n // 3, m - m // 2, n // 2 + 1),
            (m - 1, n - 1, 1, 1),
        ):
            here = slice(row, row + height), slice(column, min(n, column + width))
            first = row * n + column
            assert torch.equal(rounded(values[here], first=first, strides=(n, 1)), whole[here])
            turned = rounded(values[here].t(), first=first, strides=(1, n))
            assert torch.equal(turned, whole[here].t())
    assert rounded(torch.empty(0, 3)).shape == (0, 3)


def test_numbers_that_are_not_finite_and_bf16_numbers_stay():
    special = [float("inf"), -float("inf"), 0.0, -0.0, 1.0, -(2.0**-133), 3.3895e38]
    values = torch.tensor(special * 20).view(20, -1)
    values[:, -1] = values[:, -1].bfloat16().float()
    assert torch.equal(rounded(values).float(), values)
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -8388607], dtype=torch.int32)
    assert bool(rounded(patterns.view(torch.float32).repeat(20, 1)).isnan().all())
