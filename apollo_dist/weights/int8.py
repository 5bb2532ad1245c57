"""Weights in INT8 with one scale a row, as ``kernels/quantizer.py`` has them.

torchao's ``Int8QuantizedTrainingLinearWeight`` stores them so. A step reads some rows in floating point, updates them,
and writes them back with a new scale. Codes are rounded stochastically then, for most updates are smaller than half a
code.

The random bits of an element follow from (seed, name, step, index in the logical matrix), as ``kernels/rounding.py``
has them. So every replica and every sharding has the same codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from ..kernels.rounding import Rounding

# Where torchao has them.
MODULE, CLASS = "torchao.prototype.quantized_training.int8", "Int8QuantizedTrainingLinearWeight"

# How many elements are in floating point at a time: on CPUs they stay in the cache.
_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ACCELERATOR = 1 << 23


def is_int8(tensor: object) -> bool:
    """Whether a tensor (no DTensor) is an INT8 weight of torchao's."""
    kind = getattr(sys.modules.get(MODULE), CLASS, None)
    return kind is not None and isinstance(tensor, kind)


def local_of(parameter: Tensor) -> Tensor:
    """The local tensor of a DTensor; any other tensor itself."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def holds_int8(parameter: Tensor) -> bool:
    """Whether a parameter, whole or a DTensor, is an INT8 weight of torchao's."""
    return is_int8(local_of(parameter))


def quantize_again(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, rounded to nearest; those that it was made of, where rows are codes times scales.

    So weights that go from INT8 to floating point and back stay as they were, if no bit was lost on the way.

    Args:
        values: (rows, n) in float32 or float64.
        dtype: of the scales.
    """
    from ..kernels.quantizer import (
        LARGEST,
        dequantize,
        divided,
        quantize,
    )  # what only describes weights needs no kernels

    codes, scale = quantize(values, dtype)
    largest = values.abs().amax(1)
    done = torch.zeros_like(largest, dtype=torch.bool)
    for code in (LARGEST, LARGEST - 1):  # the largest element of a row has one of these
        near = divided(largest, code).to(dtype)
        infinity = torch.full_like(near, torch.inf)
        for tried in (near, torch.nextafter(near, infinity), torch.nextafter(near, -infinity)):
            there = (values / tried.to(values.dtype)[:, None]).round_().nan_to_num_(0.0, 0.0, 0.0)
            there = there.clamp_(-LARGEST, LARGEST).to(torch.int8)
            exact = (dequantize(there, tried, values.dtype) == values).all(1) & ~done
            codes[exact], scale[exact] = there[exact], tried[exact]
            done |= exact
    return codes, scale


@dataclass(frozen=True)
class Int8Rows:
    """The rows of an INT8 matrix that this rank holds, for reading and writing.

    Attributes:
        stored: returns the codes, (rows, n) in INT8, and the scales, (rows,).
        name: canonical name of the matrix.
        shape: (rows, n) of what is held here.
        first: the index of the first element here in the whole matrix, row by row.
        seed: of the optimizer.
    """

    stored: Callable[[], tuple[Tensor, Tensor]]
    name: str
    shape: tuple[int, int]
    first: int
    seed: int = 0

    def rounding(self, step: int) -> Rounding:
        """How the codes of a step are rounded.

        Args:
            step: the number of the step, from 1.
        """
        from ..kernels.rounding import Rounding, key_of  # what only describes weights needs no kernels

        return Rounding(key_of(self.seed, self.name), step, self.first, (self.shape[1], 1))

    def windows(self, step: int, dtype: torch.dtype, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time in floating point. What the loop's body leaves in them is stored when it goes on.

        Args:
            step: the number of the step, from 1, for the random bits.
            dtype: float32 or float64.
            multiple: of which the number of rows of each window is one.

        Yields:
            Which of the rows here, and their weights, (rows of the window, n), to be changed in place.
        """
        from ..kernels.quantizer import dequantize, quantize
        from ..kernels.rounding import random_bits

        codes, scale = self.stored()
        rows, columns = self.shape
        elements = _ELEMENTS.get(codes.device.type, _ELEMENTS_ACCELERATOR)
        height = multiple * max(1, elements // max(1, columns * multiple))
        key, step, first, _ = self.rounding(step)
        for start in range(0, rows, height):
            here = slice(start, min(start + height, rows))
            values = dequantize(codes[here], scale[here], dtype)
            yield here, values
            index = first + start * columns
            bits = random_bits(key, step, index, values.shape[0], columns, columns, values.device)
            new_codes, new_scale = quantize(values, scale.dtype, bits)
            codes[here].copy_(new_codes)
            scale[here].copy_(new_scale)

    def load(self, values: Tensor) -> None:
        """Store weights, (rows, n) in any dtype, on any device; codes times scales as they were, others to nearest."""
        codes, scale = self.stored()
        wide = torch.promote_types(torch.promote_types(values.dtype, scale.dtype), torch.float32)
        height = max(1, _ELEMENTS["cpu"] // max(1, self.shape[1]))
        for start in range(0, self.shape[0], height):
            here = slice(start, start + height)
            new_codes, new_scale = quantize_again(values[here].to(wide), scale.dtype)
            codes[here].copy_(new_codes)
            scale[here].copy_(new_scale)

    def checksum(self) -> tuple[int, float]:
        """Two numbers that replicas have in common; the host waits for them."""
        codes, scale = self.stored()
        if not codes.numel():
            return 0, 0.0
        sums = codes.sum(1, dtype=torch.int64)
        place = torch.arange(1, len(sums) + 1, device=sums.device)
        return int((sums * place).sum()), float((scale.double() * place).sum())
