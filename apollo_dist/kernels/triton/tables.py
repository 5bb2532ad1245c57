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

# Vectors of 16 bytes need addresses that are multiples of this,
BYTES = 16
# and strides and extents that are multiples of so many elements, of two bytes or more. Kernels are told of it as well,
# for they read both from tables, so the compiler knows nothing of them.
EIGHT = 8


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; decided when they were imported."""
    return bool(triton.knobs.runtime.interpret)


def layout(*tensors: Tensor) -> tuple[int, bool]:
    """How rectangles lie in memory, in a way that all of them have in common.

    Returns:
        Along which dimension neighbours are neighbours in memory: 2 for the second, 1 for the first, 0 for neither; and
        whether vectors of eight elements along it are aligned, and either inside of a rectangle or outside.
    """
    unit = 2 if all(t.stride(1) == 1 for t in tensors) else 1 if all(t.stride(0) == 1 for t in tensors) else 0
    across, along = (0, 1) if unit == 2 else (1, 0)
    aligned = all(
        t.data_ptr() % BYTES == 0
        and t.shape[along] % EIGHT == 0
        and (t.stride(across) % EIGHT == 0 or t.shape[across] == 1)
        for t in tensors
    )
    return unit, aligned and unit != 0


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, cost: Callable[[], Cost], *args: Any, **constants: Any
) -> None:
    """Launch a kernel; on the meta device tell what it would cost.

    Products and sums are fused unless ``constants`` says otherwise: what Triton does by default changed with 3.10.
    """
    if device.type == "meta":
        tell(cost())
    else:
        kernel[grid](*args, **({"enable_fp_fusion": True} | constants))


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
