"""Tables that tell the programs of one launch which matrix, and which part of it, is theirs.

A row of a table is int64: pointers, strides, extents. A program loads its row and turns an integer into a pointer. So
one launch takes any number of matrices of any shapes, and launches do not grow with a model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..costs import Cost, tell
from ..transfer import moved, to_device

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


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, cost: Callable[[], Cost], *args: Any, **constants: Any
) -> None:
    """Launch a kernel; on the meta device tell what it would cost."""
    if device.type == "meta":
        tell(cost())
    else:
        kernel[grid](*args, **constants)


def rows_on(device: torch.device, rows: Sequence[Sequence[int]]) -> Tensor:
    """A table of this step's addresses, (rows, columns) in int64, copied without waiting."""
    return to_device(rows, torch.int64, device)


@lru_cache(maxsize=256)
def blocks_on(device: torch.device, extents: tuple[tuple[int, ...], ...], blocks: tuple[int, ...]) -> Tensor:
    """A table of the blocks that rectangles are divided into, (blocks, 1 + dimensions) in int64: part, block indices.

    It follows from shapes, so it is made once and stays on the device.

    Args:
        device: where it goes.
        extents: of each part.
        blocks: most of a block along each dimension.
    """
    tables = []
    for number, extent in enumerate(extents):
        counts = [blocks_of(length, block) for length, block in zip(extent, blocks, strict=True)]
        axes = [torch.arange(count, device="cpu") for count in counts]
        indices = torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*axes, indexing="ij")], dim=1)
        tables.append(torch.cat([torch.full((len(indices), 1), number, device="cpu"), indices], dim=1))
    return moved(torch.cat(tables), device)


def blocks_of(length: int, block: int) -> int:
    """How many blocks cover ``length``."""
    return -(-length // block)
