"""Tables that tell the programs of one launch which matrix, and which part of it, is theirs.

A row of a table is int64: pointers, strides, extents. A program loads its row and turns an integer into a pointer. So
one launch takes any number of matrices of any shapes, and launches do not grow with a model's depth.
"""

from __future__ import annotations

import triton
from torch import Tensor

# Pointers and strides that are multiples of this allow vectorized loads; the kernels promise it to the compiler.
_ALIGNMENT = 16


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; decided when they were imported."""
    return bool(triton.knobs.runtime.interpret)


def layout(*tensors: Tensor) -> tuple[bool, bool]:
    """How rectangles of one shape lie in memory: whether channels are contiguous, and whether all are aligned.

    The first is True for transposed views, where the elements of neighbouring channels are neighbours. A kernel needs
    one answer for all its tensors; where they differ, its loads are correct and slower.
    """
    transposed = all(t.stride(0) == 1 for t in tensors) and any(t.stride(1) != 1 for t in tensors)
    aligned = all(
        t.data_ptr() % _ALIGNMENT == 0 and t.stride(0 if not transposed else 1) * t.element_size() % _ALIGNMENT == 0
        for t in tensors
    )
    return transposed, aligned


def blocks_of(length: int, block: int) -> int:
    """How many blocks cover ``length``."""
    return -(-length // block)
