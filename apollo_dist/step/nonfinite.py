"""Steps that are left out, on every rank, because a gradient on one of them is not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import known_to_all
from ..exchange.collectives import first_rank_where

logger = logging.getLogger("apollo_dist")


class NonFiniteGuard:
    """Finds gradients with infinities or NaN, counts the steps left out, and gives up after too many in a row.

    Args:
        enabled: whether to look at all.
        limit: how many steps in a row may be left out; None for any number.
        process_group: the ranks that decide together, by default all.

    Attributes:
        skipped: steps left out so far.
        in_a_row: steps left out since the last one that was made.
    """

    def __init__(self, enabled: bool, limit: int | None, process_group: dist.ProcessGroup | None) -> None:
        self.enabled, self.limit, self._process_group = enabled, limit, process_group
        self.skipped = self.in_a_row = 0

    def facts(self) -> dict[str, object]:
        """What ranks must have in common."""
        return {"skip_nonfinite": self.enabled, "max_skipped_steps": self.limit}

    def check(self) -> None:
        """Raise ValueError for arguments that are none."""
        if not isinstance(self.enabled, bool):
            raise ValueError(f"skip_nonfinite must be True or False, got {self.enabled!r}")
        limit = self.limit
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"max_skipped_steps must be an integer of at least 0, or None for no limit, got {limit!r}")

    def skips(self, gradients: Callable[[], Iterable[Tensor]], device: torch.device) -> bool:
        """Whether this step is to be left out; the same on every rank.

        Where it is ``enabled``, this is a collective, and it waits for the device.

        Args:
            gradients: gives this rank's, of any shapes.
            device: where this rank's gradients are, also if it has none.

        Raises:
            RuntimeError: on every rank, when more than ``limit`` steps in a row were left out.
        """
        if not self.enabled:
            return False
        rank = first_rank_where(not_finite(list(gradients()), device), self._process_group)
        if rank is None:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.limit is not None and self.in_a_row > self.limit:
            error = RuntimeError(
                f"gradients were not finite in {self.in_a_row} steps in a row, more than max_skipped_steps="
                f"{self.limit}; in this one first on rank {rank}. Weights and states are those of the last good step. "
                "Lower the learning rate, or look at the data of these steps"
            )
            raise known_to_all(error, self._process_group)
        logger.warning(
            "step left out: gradients are not finite, first on rank %d (%d in a row, %d in all)",
            rank,
            self.in_a_row,
            self.skipped,
        )
        return True


def not_finite(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Whether any element is infinite or NaN, or the squares of a tensor overflow float32; a bool scalar."""
    if not gradients:
        return torch.zeros((), dtype=torch.bool, device=device)
    wide = [g.dtype if g.dtype == torch.float64 else torch.float32 for g in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=dtype).to(device) for g, dtype in zip(gradients, wide, strict=True)]
    return ~torch.isfinite(torch.stack([norm.double() for norm in norms])).all()
