"""What one ``step()`` works on: everything built once from the layouts, and kept while the parameters stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..exchange.collectives import Exchange
from ..exchange.plan import MatrixSpec, make_plan
from ..projections.cache import ProjectionCache
from ..sharding.local_shard import Holding, matrices, matrix_name
from ..state.slots import Slot, ready
from .batch import Batch, make_batches
from .matrix import Matrix, spec_of


class AdamTensor:
    """The part of a parameter without a low rank that this rank holds: plain AdamW on a flat run of elements."""

    def __init__(self, holding: Holding, group: dict[str, Any], state: Slot) -> None:
        self.holding, self.group, self.state = holding, group, state
        kind = {"dtype": holding.compute_dtype, "device": holding.device}
        ready(
            state,
            holding.name,
            {"exp_avg": (holding.numel,), "exp_avg_sq": (holding.numel,)},
            kind,
            holding.cover.held(holding.group.rank),
        )

    def begin_step(self) -> bool:
        """Count the step if there is a gradient; without one the tensor is skipped."""
        if self.holding.grad() is None:
            return False
        self.state["step"] += 1
        return True

    def gradient(self) -> Tensor:
        """The local gradient, flat, in the compute dtype."""
        grad = self.holding.grad()
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"{self.holding.name} has a sparse gradient, which APOLLO does not support")
        return grad.detach().reshape(-1).to(self.holding.compute_dtype)


def specs_of(holding: Holding, group: dict[str, Any]) -> list[MatrixSpec]:
    """The matrices in one low-rank parameter."""
    count, m, n = matrices(holding.shape)
    return [
        spec_of(matrix_name(holding.name, index, count), m, n, group, holding.cover.tiles(index, m, n))
        for index in range(count)
    ]


class ShardGroupStep:
    """All matrices of one shard group on one device: they share one plan and its two collectives."""

    def __init__(self, entries: Sequence[tuple[Holding, MatrixSpec, dict[str, Any]]]) -> None:
        group, device = entries[0][0].group, entries[0][0].device
        wide = any(holding.compute_dtype == torch.float64 for holding, _, _ in entries)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = device
        self.plan = make_plan([spec for _, spec, _ in entries], group.size)
        self.exchange = Exchange(self.plan, group, self.dtype, device)
        self._entries = entries
        self.matrices: list[Matrix] = []
        self.batches: list[Batch] = []

    def load(self, slots: Callable[[str], Slot], cache_projection: bool) -> None:
        """Make or check the states of the matrices.

        Args:
            slots: the state of a matrix by its name, empty if there is none yet.
            cache_projection: whether projections are kept until they are redrawn.
        """
        for (holding, spec, group), channels in zip(self._entries, self.exchange.channels, strict=True):
            state = slots(spec.name)
            kind: dict[str, Any] = {"dtype": holding.compute_dtype, "device": holding.device}
            moment = (channels.owned.count, spec.rank)
            shapes = {"exp_avg": moment, "exp_avg_sq": moment, "last_norm": ()}
            ready(state, spec.name, shapes, kind, [list(r) for r in channels.owned.ranges])
            self.matrices.append(Matrix(spec, holding, channels, group, state))
        self.projections = ProjectionCache([m.slab for m in self.matrices], self.device, keep=cache_projection)
        self.batches = make_batches(self.matrices)
