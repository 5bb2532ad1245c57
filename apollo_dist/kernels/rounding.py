"""Stochastic rounding to bf16: up or down at random, so that the mean of what is stored is the number itself.

A number between two neighbours a < b in bf16 becomes b with the probability (x - a) / (b - a): 16 random bits are added
to the 16 bits of its fp32 form that bf16 has no room for, and the sum is cut off there.

The random bits of an element are a function of (seed, name, stream, step, index), where the index is the place of the
element in the whole logical matrix, row by row. So every layout and number of ranks rounds alike, and a resumed run
goes on as it would have. One call of Philox makes the bits of eight neighbours: for the elements 8 c to 8 c + 7 the
counter is (c, step, one word of a hash), c in two words, and the key is two more words of the hash. What is hashed
begins with another text than that of projections (``projections/gaussian.py``), so keys and counters have nothing to
do with theirs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import MASK32, philox_4x32_10, words_of

# How many elements are rounded at a time, which bounds the temporaries: on CPU they stay in the second-level cache.
_ELEMENTS = {"cpu": 1 << 16}
_ELEMENTS_ACCELERATOR = 1 << 22

WEIGHT = "weight"  # the stream that weights are rounded with; states are rounded with streams of their names

Key = tuple[int, int, int]


class Rounding(NamedTuple):
    """Which random bits the elements of a rectangle are rounded with.

    Attributes:
        key: what ``key_of`` returned for the matrix.
        step: the number of the step, from 1, as the state counts it.
        first: the index of the rectangle's first element in the whole matrix, row by row.
        strides: how much larger the index is of the next element along either dimension; one of them is 1.
    """

    key: Key
    step: int
    first: int
    strides: tuple[int, int]

    def of_rows(self, rows: slice | None) -> Rounding:
        """Of some rows of the rectangle; of all for None."""
        return self if rows is None else self._replace(first=self.first + rows.start * self.strides[0])

    def in_eights(self, rows: int, columns: int) -> bool:
        """Whether eight neighbours of a rectangle of that shape always are the eight of one call of Philox."""
        (stride, along), lines = self.strides, rows
        if along != 1:
            stride, lines = along, columns
        return self.first % 8 == 0 and (stride % 8 == 0 or lines == 1)


@lru_cache(maxsize=1 << 16)
def key_of(seed: int, name: str, stream: str = WEIGHT) -> Key:
    """Two words of key and one of counter, each of 32 bits.

    Args:
        seed: of the optimizer.
        name: canonical fully qualified name of the matrix or tensor.
        stream: what of it is rounded; streams are independent of each other.
    """
    words = words_of(f"apollo_dist rounding\0{seed}\0{stream}\0{name}")
    return words[0], words[1], words[2]


def random_bits(
    key: Key, step: int, first: int, rows: int, columns: int, stride: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Random bits of a rectangle of elements, which nothing waits for.

    Args:
        key: what ``key_of`` returned.
        step: the number of the step, in [0, 2**32).
        first: the index of the first element.
        rows, columns: of the rectangle.
        stride: how much larger the index of the next row is; that of the next column is larger by 1.
        device: where to generate.

    Returns:
        (rows, columns) in int32: integers in [0, 65536), each with the same probability.
    """
    device = torch.device(device)
    if not rows or not columns:
        return torch.empty((rows, columns), dtype=torch.int32, device=device)
    if stride == columns and rows > 1:  # one piece
        return random_bits(key, step, first, 1, rows * columns, rows * columns, device).view(rows, columns)
    starts = first + stride * torch.arange(rows, device=device)
    # Enough calls for the rows that begin with the last bits of one.
    calls = (starts >> 3)[:, None] + torch.arange((columns + 14) // 8, device=device)
    k0, k1, tail, count = (torch.full((1, 1), word, dtype=torch.int64, device=device) for word in (*key, step & MASK32))
    w0, w1, w2, w3 = philox_4x32_10((calls & MASK32, calls >> 32, count, tail), (k0, k1))
    words = torch.stack([w0 | (w1 << 32), w2 | (w3 << 32)], dim=-1)
    bits = words.view(torch.uint16).view(rows, -1).to(torch.int32)
    if rows == 1 or stride % 8 == 0:
        return bits[:, first % 8 : first % 8 + columns]
    return bits.gather(1, (starts & 7)[:, None] + torch.arange(columns, device=device))


def write(out: Tensor, values: Tensor, rounding: Rounding | None) -> None:
    """Write ``values`` to ``out``, rounded to nearest for None, else as ``round_into`` does."""
    if rounding is None:
        out.copy_(values)
    else:
        round_into(out, values, rounding)


def round_into(out: Tensor, values: Tensor, rounding: Rounding) -> None:
    """Write ``values`` to ``out``, rounded stochastically; infinities and NaN as they are.

    A number beyond bf16's largest may become infinite, as it does when it is rounded to nearest.

    Args:
        out: a rectangle in bf16, in any strides, written.
        values: of the same shape, in fp32 or, to be rounded to that before, in float64.
        rounding: of the rectangle.
    """
    stride, along = rounding.strides
    if along != 1:
        out, values, stride = out.t(), values.t(), along
    rows, columns = values.shape
    limit = _ELEMENTS.get(values.device.type, _ELEMENTS_ACCELERATOR)
    height = max(1, limit // max(1, columns))
    for row in range(0, rows, height):
        for column in range(0, columns, limit):
            here = slice(row, row + height), slice(column, column + limit)
            piece = values[here].float()
            first = rounding.first + row * stride + column
            bits = random_bits(rounding.key, rounding.step, first, piece.shape[0], piece.shape[1], stride, out.device)
            cut = (piece.view(torch.int32) + bits).bitwise_and_(-65536).view(torch.float32)
            out[here].copy_(torch.where(torch.isfinite(piece), cut, piece))
