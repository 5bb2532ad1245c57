"""What every layout file answers with: what this rank holds of each parameter, and where its gradient is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ..weights.int8 import Int8Rows
    from .regions import Box, Tile

# Layouts in which ``param_groups`` holds the parameters themselves, whole or as DTensors.
PARAMETER_LAYOUTS = ("whole", "dtensor")


class Partition(Protocol):
    """How the ranks of a shard group divide one parameter among themselves."""

    def numel(self, rank: int) -> int:
        """How many elements rank ``rank`` holds."""

    def signature(self, rank: int) -> list[tuple[int, ...]]:
        """What rank ``rank`` holds, as plain integers: checkpoints compare it."""

    def boxes(self, rank: int, shape: tuple[int, ...]) -> list[Box]:
        """What rank ``rank`` holds of the parameter, of that shape, as rectangles: checkpoints store them."""

    def tiles(self, index: int, m: int, n: int) -> tuple[tuple[Tile, ...], ...]:
        """For each rank its tiles of the ``index``-th m x n matrix of the parameter."""


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that divide a parameter among themselves. ``process_group`` is None when one rank holds it whole."""

    process_group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0

    @staticmethod
    def of(process_group: dist.ProcessGroup) -> ShardGroup:
        """The shard group made of a process group's ranks, in its order."""
        size = dist.get_world_size(process_group)
        if size == 1:
            return ShardGroup()
        return ShardGroup(process_group, size, dist.get_rank(process_group))


WHOLE = ShardGroup()


@dataclass(frozen=True)
class LocalShard:
    """What this rank holds of one parameter.

    Attributes:
        name: canonical fully qualified name.
        shape: the logical, unsharded shape.
        dtype, device: of the weights that the step updates.
        layout: "whole", "dtensor", "fsdp1" or "zero", for the log.
        group: the ranks that divide the parameter.
        partition: who of them holds what.
        weight: returns the local weights; any shape, row-major order is that of ``partition``'s offsets.
        grad: returns the local gradient in the same order, or None where there is none, or where the parameter is
            frozen at present.
        rows: for weights that are stored as INT8, what reads and writes them; ``weight`` is not read then.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: str
    group: ShardGroup
    partition: Partition
    weight: Callable[[], Tensor]
    grad: Callable[[], Tensor | None]
    rows: Int8Rows | None = None

    @property
    def numel(self) -> int:
        """How many elements of the parameter this rank holds."""
        return self.partition.numel(self.group.rank)

    @property
    def in_bfloat16(self) -> bool:
        """Whether the weights that the step updates are stored as bf16 numbers."""
        return self.dtype == torch.bfloat16 and self.rows is None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of states and arithmetic: float64 for float64 weights, otherwise float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """(count, m, n) of the matrices in a parameter: 2-D is one, 3-D expert weights (E, m, n) are E.

    A vector is a matrix of one column, for rules that take vectors.
    """
    if len(shape) == 1:
        return 1, shape[0], 1
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    assert len(shape) == 3
    return shape[0], shape[1], shape[2]


def view_of(flat: Tensor, offset: int, sizes: Sequence[int], strides: Sequence[int] | None = None) -> Tensor:
    """A rectangle in a local flat buffer, as a view.

    Args:
        flat: 1-D.
        offset: where the rectangle starts.
        sizes: its shape.
        strides: how far apart its elements lie along each dimension; None for row-major order without gaps.
    """
    if strides is None:
        return flat[offset : offset + math.prod(sizes)].view(tuple(sizes))
    return flat[offset:].as_strided(tuple(sizes), [step * flat.stride(0) for step in strides])
