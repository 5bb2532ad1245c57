"""What a rank needs of a matrix's projection, and when; and what it then has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..kernels.table import Kernels


class Phase(IntEnum):
    """When a rank needs a projection: for what it sends in exchange 1, for the channels that it owns, or for low-rank
    updates of the elements that it holds."""

    REDUCE = 0
    OWN = 1
    APPLY = 2


@dataclass(frozen=True)
class ProjectionSlice:
    """What a rank needs of the projection P of one matrix.

    Attributes:
        name: of the matrix.
        rank: r.
        dtype: float32 or float64.
        columns: the range of P's columns.
        edges: of each local tile the range that it spans, within ``columns``.
        needed: in each ``Phase``.
        kind: of the entries, "gaussian" or "rademacher".
        kernels: that generate it, and multiply by it; None for torch's.
    """

    name: str
    rank: int
    dtype: torch.dtype
    columns: tuple[int, int]
    edges: tuple[tuple[int, int], ...]
    needed: tuple[bool, bool, bool]
    kind: str = "gaussian"
    kernels: Kernels | None = None

    @property
    def length(self) -> int:
        """How many columns."""
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class Projection:
    """A slab that was generated, or that is state.

    Attributes:
        slab: P^T over the columns, without its scale, as ``as_gemm_operand`` returns it.
        first: the column of P that is the slab's first row.
        tiles: the part of each local tile.
        rank: r.
        scale: the factor that the slab is without.
    """

    slab: Tensor
    first: int
    tiles: list[Tensor]
    rank: int
    scale: float

    @cached_property
    def gram(self) -> Tensor:
        """P P^T, (r, r); of a slab of all columns."""
        columns = self.slab[:, : self.rank] * self.scale
        return columns.t() @ columns

    def add_product(self, low_rank: Tensor, number: int, out: Tensor, size: float, inner: slice = slice(None)) -> None:
        """Add ``size`` times A P over the columns of a local tile to ``out``.

        Args:
            low_rank: A, (channels, r), in the dtype of ``out``.
            number: of the tile.
            out: (channels, the tile's inner extent), in any strides.
            size: a factor.
            inner: which of the tile's inner extent ``out`` is.
        """
        out.addmm_(low_rank, self.tiles[number][inner, : self.rank].t(), alpha=size * self.scale)


def scale_of(rank: int) -> float:
    """1/sqrt(r), the factor that is kept out of the entries; 1 where nothing is projected."""
    return 1.0 / math.sqrt(rank) if rank else 1.0
