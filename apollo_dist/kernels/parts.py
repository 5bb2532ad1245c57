"""Arguments that kernels over many matrices take: which rectangles of which tensors belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .rounding import Rounding


class ProjectPart(NamedTuple):
    """A rectangle of a gradient, and where its projection goes.

    Attributes:
        grad: (channels, inner extent), any strides, bf16, fp16 or fp32: a wide matrix's comes transposed.
        columns: P^T of the inner extent, (inner extent, r), any strides, bf16. None where there is nothing to project.
        first: the row of the output that its first channel is. Parts of one channel are summed in the order given.
        matrix: which one of the matrices whose totals are summed.
        adds: whether other parts have elements of its channels, too.
    """

    grad: Tensor
    columns: Tensor | None
    first: int
    matrix: int = 0
    adds: bool = True


class ApplyPart(NamedTuple):
    """A rectangle of a weight, and what it is updated with.

    Attributes:
        weight: (channels, inner extent), any strides, bf16, fp16 or fp32; written.
        grad: like ``weight``, of any of these dtypes.
        scale: (channels,) in fp32, or None for 1.
        matrix: the row of the coefficients.
        rounding: how a weight in bf16 is rounded stochastically; None for rounding to nearest.
    """

    weight: Tensor
    grad: Tensor
    scale: Tensor | None
    matrix: int
    rounding: Rounding | None = None


class RowsPart(NamedTuple):
    """Rows of a weight in INT8 (``quantizer.py``), and what they are updated with.

    Attributes:
        codes: (rows, n) in INT8, contiguous, written.
        scales: (rows,) in bf16, fp16 or fp32, contiguous, written.
        grad: (rows, n), any strides, bf16, fp16 or fp32.
        factors: (channels,) in fp32, contiguous; None for 1.
        block: how many rows are a channel; 0 where columns are channels.
        matrix: the row of the coefficients.
        rounding: how codes are rounded stochastically.
    """

    codes: Tensor
    scales: Tensor
    grad: Tensor
    factors: Tensor | None
    block: int
    matrix: int
    rounding: Rounding


class AdamWPart(NamedTuple):
    """A tensor that AdamW updates: all 1-D, contiguous and of one length.

    Attributes:
        weight, grad: in bf16, fp16 or fp32.
        exp_avg, exp_avg_sq: in fp32, or both in bf16.
        columns: how long the rows are of the rectangle that the elements are, one row after the other.
        rounding: how a weight in bf16 is rounded stochastically, as that rectangle; None for rounding to nearest.
        moments: the same for moments in bf16; None for moments in fp32.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    columns: int = 0
    rounding: Rounding | None = None
    moments: tuple[Rounding, Rounding] | None = None
