"""INT8 with one scale a row: W[i, j] = codes[i, j] * scale[i], codes from -127 to 127.

The scale is the smallest number of its dtype that keeps the largest element of the row within 127 codes, so that no
element is cut off, which would shrink it in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (rows, n) in INT8 times their rows' scales (rows,), in ``dtype``."""
    return codes.to(dtype).mul_(scale.to(dtype)[:, None])


def quantize(values: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (rows, n) in INT8 and scales (rows,) of a matrix.

    A row with an element that is not finite has such a scale, and so is not finite as a whole.

    Args:
        values: (rows, n) in float32 or float64.
        dtype: of the scales.
        bits: (rows, n), integers in [0, 65536) by which codes are rounded stochastically: the mean of a code is its
            quotient to 2**-17. None rounds to nearest.
    """
    largest = values.abs().amax(1)
    scale = _at_least(divided(largest, LARGEST), dtype)
    # Rows of zeros have scale 0.
    scale = torch.where(largest > 0, scale.clamp(min=torch.finfo(dtype).tiny), scale)
    quotient = (values / scale.to(values.dtype)[:, None]).nan_to_num_(0.0, 0.0, 0.0)
    if bits is None:
        codes = quotient.round_()
    else:
        codes = quotient.floor()
        codes += quotient.sub_(codes).mul_(65536.0) > bits + 0.5
    return codes.clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def divided(values: Tensor, by: int) -> Tensor:
    """``values / by``, rounded once: CUDA multiplies by the rounded reciprocal of what is no tensor."""
    return values / torch.full_like(values, by)


def _at_least(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of ``dtype`` that are not less than ``values``."""
    near = values.to(dtype)
    return torch.where(near.to(values.dtype) < values, torch.nextafter(near, torch.full_like(near, torch.inf)), near)
