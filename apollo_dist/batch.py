"""Neighbouring matrices whose moments lie in one tensor, so that the rule runs over all their channels at once.

Most of APOLLO's arithmetic is on small tensors: a model has hundreds of matrices, and with rank 1 each has a few
thousand numbers of state. One call for each matrix and operation would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import rule
from .matrix import GRADIENT, LOW_RANK, NORMALIZED, Matrix

# How many low-rank numbers a batch may have, which bounds the memory that R takes: on CPU so that a batch stays in the
# cache from the projection to the norms, on accelerators 256 MiB.
_NUMBERS_CPU = 1 << 18
_NUMBERS_ACCELERATOR = 1 << 26


class Batch:
    """Consecutive matrices of a unit with one parameter group, rank and dtype.

    Args:
        matrices: at least one; their states' moments become views of this batch's.
        first: the place of the first one in the unit.
    """

    def __init__(self, matrices: Sequence[Matrix], first: int) -> None:
        self.matrices, self.first = list(matrices), first
        self.counts = [m.channels.owned.count for m in matrices]
        ends = list(accumulate(self.counts))
        self._rows = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        spec, holding = matrices[0].spec, matrices[0].holding
        self._kind: dict[str, Any] = {"dtype": holding.compute_dtype, "device": holding.device}
        self.exp_avg = torch.zeros((ends[-1], spec.rank), **self._kind)
        self.exp_avg_sq = torch.zeros((ends[-1], spec.rank), **self._kind)
        for m, rows in zip(matrices, self._rows, strict=True):
            for key, moment in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
                moment[rows] = m.state[key]
                m.state[key] = moment[rows]

    def owner_step(
        self, active: Sequence[bool], seed: int, received: Sequence[Any], terms: Tensor
    ) -> list[Tensor | None]:
        """Complete R over the owned channels, update their moments and write this rank's norm terms.

        Args:
            active: for each matrix of the unit whether it has a gradient; the others are left alone.
            seed: of the projections.
            received: for each matrix of the unit what ``Exchange.to_owners`` returned, or None.
            terms: (matrices of the unit, TERMS), written in place.

        Returns:
            For each matrix of the batch its owned channels' scaling factors, (channels,), or None with tensor scaling.
        """
        spec, group = self.matrices[0].spec, self.matrices[0].group
        low_rank = torch.empty_like(self.exp_avg)
        norms = torch.empty(low_rank.shape[0], **self._kind) if spec.channel_norms else None
        for i, (m, rows) in enumerate(zip(self.matrices, self._rows, strict=True), start=self.first):
            if active[i]:
                m.complete(low_rank[rows], None if norms is None else norms[rows], seed, received[i])
        normalized = torch.zeros(low_rank.shape[0], **self._kind)
        plain, scale = torch.zeros_like(normalized), torch.zeros_like(normalized)
        for rows in self._active_rows(active):
            moments, part = (self.exp_avg[rows], self.exp_avg_sq[rows]), low_rank[rows]
            update = rule.normalize(*moments, part, betas=group["betas"], eps=group["eps"])
            torch.linalg.vector_norm(update, dim=1, out=normalized[rows])
            torch.linalg.vector_norm(part, dim=1, out=plain[rows])
            scale[rows] = rule.channel_scale(normalized[rows], plain[rows])
            if norms is not None:
                # From here on s_c ||G_c||, whose norm over a matrix's channels is ||U||.
                norms[rows] = norms[rows].sqrt_().mul_(scale[rows])
        mine = terms[self.first : self.first + len(self.matrices)]
        if spec.channel_scales:
            if norms is not None:
                self._sum(norms, active, mine[:, GRADIENT])
            return list(torch.split(scale, self.counts))
        self._sum(normalized, active, mine[:, NORMALIZED])
        self._sum(plain, active, mine[:, LOW_RANK])
        if GRADIENT in spec.terms:
            self._gradient_norms(active, mine[:, GRADIENT])
        return [None] * len(self.matrices)

    def _active_rows(self, active: Sequence[bool]) -> list[slice]:
        """The rows of the matrices with a gradient, neighbours merged."""
        runs: list[slice] = []
        for i, rows in enumerate(self._rows, start=self.first):
            if not active[i] or rows.start == rows.stop:
                continue
            if runs and runs[-1].stop == rows.start:
                runs[-1] = slice(runs[-1].start, rows.stop)
            else:
                runs.append(rows)
        return runs

    def _sum(self, channels: Tensor, active: Sequence[bool], out: Tensor) -> None:
        """Each active matrix's sum of squares over its channels."""
        parts = torch.split(channels, self.counts)
        self._squares(list(parts), list(range(len(parts))), active, out)

    def _gradient_norms(self, active: Sequence[bool], out: Tensor) -> None:
        """Each active matrix's squared gradient norm over this rank's tiles."""
        tiles, owners = [], []
        for k, m in enumerate(self.matrices):
            if active[self.first + k]:
                for tile in m.raw_gradients():
                    tiles.append(tile)
                    owners.append(k)
        self._squares(tiles, owners, active, out)

    def _squares(self, tensors: list[Tensor], owners: list[int], active: Sequence[bool], out: Tensor) -> None:
        """Add the squared norm of each tensor to its matrix's place in ``out``, in order."""
        kept = [(t, k) for t, k in zip(tensors, owners, strict=True) if active[self.first + k] and t.numel()]
        if not kept:
            return
        squares = rule.norms([t for t, _ in kept], self._kind["dtype"]).square_()
        places = [k for _, k in kept]
        if places == list(range(out.shape[0])):
            out.copy_(squares)
        else:
            for square, k in zip(squares.unbind(), places, strict=True):
                out[k] += square


def make_batches(matrices: Sequence[Matrix]) -> list[Batch]:
    """Divide a unit's matrices, in order, into batches."""
    batches: list[Batch] = []
    run: list[Matrix] = []
    numbers = 0
    for i, m in enumerate(matrices):
        size = m.channels.owned.count * m.spec.rank
        limit = _NUMBERS_CPU if m.holding.device.type == "cpu" else _NUMBERS_ACCELERATOR
        if run and (not _alike(run[0], m) or numbers + size > limit):
            batches.append(Batch(run, i - len(run)))
            run, numbers = [], 0
        run.append(m)
        numbers += size
    if run:
        batches.append(Batch(run, len(matrices) - len(run)))
    return batches


def _alike(a: Matrix, b: Matrix) -> bool:
    return a.group is b.group and a.spec.rank == b.spec.rank and a.holding.compute_dtype == b.holding.compute_dtype
