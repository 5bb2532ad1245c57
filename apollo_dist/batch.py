"""Neighbouring matrices whose moments lie in one tensor, so that the rule runs over all their channels at once.

Most of APOLLO's arithmetic is on small tensors: a model has hundreds of matrices, and with rank 1 each has a few
thousand numbers of state. One call for each matrix and operation would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import rule
from .exchange.collectives import TERMS
from .matrix import GRADIENT, LOW_RANK, NORMALIZED, Matrix

# How many gradient elements a batch may have, which bounds the memory that converted gradients take, and how many
# low-rank numbers a chunk of it, which bounds that of R: on CPU so that R stays in the cache until its norms are taken.
_ELEMENTS = {"cpu": 1 << 25}
_NUMBERS = {"cpu": 1 << 18}
_ACCELERATOR = 1 << 26

# The gradients of a batch's matrices: for each the tiles' views, or None where a matrix has no gradient.
Gradients = list[list[Tensor] | None]


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
        self._chunks = _runs([c * spec.rank for c in self.counts], _NUMBERS.get(holding.device.type, _ACCELERATOR))
        self._kind: dict[str, Any] = {"dtype": holding.compute_dtype, "device": holding.device}
        self.exp_avg = torch.zeros((ends[-1], spec.rank), **self._kind)
        self.exp_avg_sq = torch.zeros((ends[-1], spec.rank), **self._kind)
        self.last_norm = torch.zeros(len(self.matrices), **self._kind)
        for i, (m, rows) in enumerate(zip(self.matrices, self._rows, strict=True)):
            places = {
                "exp_avg": self.exp_avg[rows],
                "exp_avg_sq": self.exp_avg_sq[rows],
                "last_norm": self.last_norm[i],
            }
            for key, place in places.items():
                place.copy_(m.state[key])
            m.state.update(places)

    def gradients(self, active: Sequence[bool]) -> Gradients:
        """The gradients in the compute dtype; None for matrices that are not active.

        Args:
            active: for each matrix of the unit whether it has a gradient.
        """
        return [m.gradients() if active[i] else None for i, m in enumerate(self.matrices, start=self.first)]

    def owner_step(
        self, grads: Gradients, seed: int, received: Sequence[Any], terms: Tensor
    ) -> Sequence[Tensor | None]:
        """Complete R over the owned channels, update their moments and write this rank's norm terms.

        Args:
            grads: of the batch's matrices; those without one are left alone.
            seed: of the projections.
            received: for each matrix of the unit what ``Exchange.to_owners`` returned, or None.
            terms: (matrices of the unit, TERMS), written in place.

        Returns:
            For each matrix of the batch its owned channels' scaling factors, (channels,), or None with tensor scaling.
        """
        spec = self.matrices[0].spec
        # By channel: norms of N, of R, and of G where they are needed; zeros where there is no gradient.
        normalized, low_rank = torch.zeros((2, self.exp_avg.shape[0]), **self._kind).unbind()
        norms = torch.empty_like(normalized) if spec.channel_norms else None
        held: list[tuple[Tensor, int, int]] = []
        for chunk in self._chunks:
            held += self._update_moments(chunk, grads, seed, received, (normalized, low_rank, norms))
        mine = terms[self.first : self.first + len(self.matrices)]
        if not spec.channel_scales:
            parts = [*self._by_matrix(normalized, grads, NORMALIZED), *self._by_matrix(low_rank, grads, LOW_RANK)]
            self._add_squares([*parts, *held], mine)
            return [None] * len(self.matrices)
        scale = rule.channel_scale(normalized, low_rank)
        if norms is not None:
            # The norm over a matrix's channels of s_c ||G_c|| is ||U||.
            self._add_squares(self._by_matrix(norms.mul_(scale), grads, GRADIENT), mine)
        return torch.split(scale, self.counts)

    def _update_moments(
        self,
        chunk: range,
        grads: Gradients,
        seed: int,
        received: Sequence[Any],
        norms: tuple[Tensor, Tensor, Tensor | None],
    ) -> list[tuple[Tensor, int, int]]:
        """R and its moments for some of the matrices.

        Writes the channels' norms of N, R and G into ``norms``; returns what ``_add_squares`` is to add to ||G||^2
        where the channels' norms of G are not needed.
        """
        spec, group = self.matrices[0].spec, self.matrices[0].group
        start, stop = self._rows[chunk[0]].start, self._rows[chunk[-1]].stop
        low_rank = torch.empty((stop - start, spec.rank), **self._kind)
        held: list[tuple[Tensor, int, int]] = []
        for k in chunk:
            m, grad, rows = self.matrices[k], grads[k], self._rows[k]
            if grad is None:
                continue
            own = None if norms[2] is None else norms[2][rows]
            m.complete(grad, low_rank[rows.start - start : rows.stop - start], own, seed, received[self.first + k])
            if own is None and GRADIENT in spec.terms:  # now, while the gradient is in the cache
                held += [(rule.line_norms(tile), k, GRADIENT) for tile in grad]
        normalized = torch.zeros_like(low_rank)
        for rows in self._active_rows(chunk, grads):
            local = slice(rows.start - start, rows.stop - start)
            tensors = [self.exp_avg[rows], self.exp_avg_sq[rows], low_rank[local], normalized[local]]
            rule.normalize(*tensors, betas=group["betas"], eps=group["eps"])
            torch.linalg.vector_norm(normalized[local], dim=1, out=norms[0][rows])
            torch.linalg.vector_norm(low_rank[local], dim=1, out=norms[1][rows])
        return held

    def _by_matrix(self, channels: Tensor, grads: Gradients, column: int) -> list[tuple[Tensor, int, int]]:
        """The part of each active matrix, as ``_add_squares`` takes it."""
        parts = torch.split(channels, self.counts)
        return [(part, k, column) for k, part in enumerate(parts) if grads[k] is not None]

    def finish(
        self, grads: Gradients, owned: Sequence[Tensor | None], arriving: Sequence[Tensor | None], terms: Tensor
    ) -> None:
        """Tensor scaling, limiter and update of the local weights.

        Args:
            grads: of the batch's matrices.
            owned: what ``owner_step`` returned, for each matrix of the unit.
            arriving: for each matrix of the unit the scaling factors from exchange 2, or None.
            terms: (matrices of the unit, TERMS), summed over ranks.
        """
        spec, group = self.matrices[0].spec, self.matrices[0].group
        norms = terms[self.first : self.first + len(self.matrices)].sqrt().to(self.last_norm.dtype)
        factor = torch.ones_like(self.last_norm)
        if not spec.channel_scales:
            factor = rule.channel_scale(norms[:, NORMALIZED], norms[:, LOW_RANK])
        if not group["disable_nl"]:
            limit, last = rule.limit(factor * norms[:, GRADIENT], self.last_norm)
            factor = factor * limit
            if all(grad is not None for grad in grads):
                self.last_norm.copy_(last)
            else:
                moved = torch.tensor([grad is not None for grad in grads], device=last.device)
                self.last_norm.copy_(torch.where(moved, last, self.last_norm))
        for i, (m, grad, by) in enumerate(zip(self.matrices, grads, factor.unbind(), strict=True), start=self.first):
            if grad is not None:
                m.apply(grad, m.held_scale(owned[i], arriving[i]), by)

    def _active_rows(self, chunk: range, grads: Gradients) -> list[slice]:
        """The rows of a chunk's matrices with a gradient, neighbours merged."""
        runs: list[slice] = []
        for k in chunk:
            rows = self._rows[k]
            if grads[k] is None or rows.start == rows.stop:
                continue
            if runs and runs[-1].stop == rows.start:
                runs[-1] = slice(runs[-1].start, rows.stop)
            else:
                runs.append(rows)
        return runs

    def _add_squares(self, held: list[tuple[Tensor, int, int]], out: Tensor) -> None:
        """Add the squared norms of (tensor, matrix, column) to ``out``, (matrices, TERMS), in order."""
        held = [item for item in held if item[0].numel()]
        if not held:
            return
        squares = torch.stack(torch._foreach_norm([tensor for tensor, _, _ in held])).square_()
        places = [(k, column) for _, k, column in held]
        columns = range(TERMS)
        if places == [(k, column) for column in columns for k in range(out.shape[0])]:
            out.copy_(squares.view(TERMS, -1).t())
            return
        for square, (k, column) in zip(squares.unbind(), places, strict=True):
            out[k, column] += square


def make_batches(matrices: Sequence[Matrix]) -> list[Batch]:
    """Divide a unit's matrices, in order, into batches."""
    sizes = [sum(tile.numel for tile in m.tiles) for m in matrices]
    limit = _ELEMENTS.get(matrices[0].holding.device.type, _ACCELERATOR)
    runs = _runs(sizes, limit, lambda i, j: _alike(matrices[i], matrices[j]))
    return [Batch([matrices[i] for i in run], run[0]) for run in runs]


def _runs(sizes: Sequence[int], limit: int, alike: Callable[[int, int], bool] = lambda i, j: True) -> list[range]:
    """Ranges of neighbours that are alike and whose sizes sum to at most ``limit``, or that are alone."""
    runs: list[range] = []
    total = 0
    for i, size in enumerate(sizes):
        if runs and alike(runs[-1][0], i) and total + size <= limit:
            runs[-1] = range(runs[-1].start, i + 1)
            total += size
        else:
            runs.append(range(i, i + 1))
            total = size
    return runs


def _alike(a: Matrix, b: Matrix) -> bool:
    return a.group is b.group and a.spec.rank == b.spec.rank and a.holding.compute_dtype == b.holding.compute_dtype
