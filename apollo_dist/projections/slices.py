"""What a rank needs of a matrix's projection, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Phase(IntEnum):
    """When a rank needs a projection: for what it sends in exchange 1, or for the channels that it owns."""

    REDUCE = 0
    OWN = 1


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
    """

    name: str
    rank: int
    dtype: torch.dtype
    columns: tuple[int, int]
    edges: tuple[tuple[int, int], ...]
    needed: tuple[bool, bool]
    kind: str = "gaussian"

    @property
    def length(self) -> int:
        """How many columns."""
        return self.columns[1] - self.columns[0]


def scale_of(rank: int) -> float:
    """1/sqrt(r), the factor that is kept out of the entries; 1 where nothing is projected."""
    return 1.0 / math.sqrt(rank) if rank else 1.0
