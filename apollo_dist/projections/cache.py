"""The projections of a shard group's matrices, generated for several matrices in one call.

A draw is some 130 operations on a few thousand counters, so on an accelerator that redraws at every step its launches,
not its arithmetic, would be the time: 30,000 of them for the matrices of a 7B model one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.reduce import as_gemm_operand
from . import gaussian as projection
from .slices import Phase, Projection, ProjectionSlice, scale_of

if TYPE_CHECKING:
    from ..kernels.table import Kernels

Stored = Mapping[int, Callable[[], Projection]]
_NOTHING: Stored = MappingProxyType({})


class ProjectionCache:
    """Draws what the matrices of a shard group need, and keeps it as long as that is asked for.

    Args:
        slabs: of each matrix of the shard group.
        device: of all of them.
        keep: keep projections until they are redrawn; otherwise each is drawn anew when it is needed, and let go.
    """

    def __init__(self, slabs: Sequence[ProjectionSlice], device: torch.device, *, keep: bool) -> None:
        self._slabs, self._device, self._keep = list(slabs), device, keep
        self._runs = [self._divide(phase) for phase in Phase]
        self._drawn: dict[int, tuple[int, Projection]] = {}
        # By run what the draw starts from, on the device: copied there once in ``update_proj_gap`` steps, not in each.
        self._identities: dict[tuple[int, ...], tuple[tuple[int, ...], Tensor]] = {}
        self._seed = 0
        self._refreshes: Sequence[int | None] = []
        self._stored = _NOTHING

    def _divide(self, phase: int) -> dict[int, tuple[int, ...]]:
        """For each matrix that needs its projection in a phase, those drawn with it: of one shape, dtype and kind."""
        alike: dict[tuple[int, int, torch.dtype, str, Kernels | None], list[int]] = {}
        for k, slab in enumerate(self._slabs):
            if slab.needed[phase]:
                alike.setdefault((slab.rank, slab.length, slab.dtype, slab.kind, slab.kernels), []).append(k)
        found = {}
        for (rank, length, _, kind, kernels), members in alike.items():
            count = projection.drawn_together(rank, length, self._device, kind, kernels)
            for first in range(0, len(members), count):
                run = tuple(members[first : first + count])
                found.update(dict.fromkeys(run, run))
        return found

    def begin(self, seed: int, refreshes: Sequence[int | None], stored: Stored = _NOTHING) -> None:
        """Begin a step.

        Args:
            seed: of the projections.
            refreshes: of each matrix how often its projection was redrawn before; None if it is not to be updated.
            stored: what gives projections that do not follow from the seed, by number of the matrix; called in each
                phase, for one may be converted.
        """
        self._stored = stored
        if seed != self._seed:
            self._drawn.clear()
            self._identities.clear()
        self._seed, self._refreshes = seed, refreshes

    def of(self, k: int, phase: int) -> Projection | None:
        """What is needed of matrix ``k`` in a phase of the step; None if nothing is."""
        if k in self._stored:
            return self._stored[k]()
        refresh = self._refreshes[k]
        if refresh is None or not self._slabs[k].needed[phase]:
            return None
        if not self._is_drawn(k):
            self._draw(self._runs[phase][k])
        return (self._drawn[k] if self._keep else self._drawn.pop(k))[1]

    def _is_drawn(self, k: int) -> bool:
        return k in self._drawn and self._drawn[k][0] == self._refreshes[k]

    def _draw(self, run: tuple[int, ...]) -> None:
        wanted = [(k, refresh) for k in run if (refresh := self._refreshes[k]) is not None and not self._is_drawn(k)]
        for k, _ in wanted:
            self._drawn.pop(k, None)  # before there is memory for the next one
        slab = self._slabs[run[0]]
        key = tuple(refresh for pair in wanted for refresh in pair)
        if run not in self._identities or self._identities[run][0] != key:
            names = [(self._slabs[k].name, refresh, self._slabs[k].columns[0]) for k, refresh in wanted]
            self._identities[run] = (key, projection.philox_keys(self._seed, names, self._device))
        starts = self._identities[run][1]
        drawn = projection.draw(starts, slab.rank, slab.length, slab.dtype, slab.kind, slab.kernels)
        together = slab.kernels is not None and slab.kernels.together
        operands = drawn.mT if together else as_gemm_operand(drawn)
        for (k, refresh), columns in zip(wanted, operands.unbind(), strict=True):
            first = self._slabs[k].columns[0]
            tiles = [columns[a - first : b - first] for a, b in self._slabs[k].edges]
            self._drawn[k] = (refresh, Projection(columns, first, tiles, slab.rank, scale_of(slab.rank)))
