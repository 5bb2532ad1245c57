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

from ..projections.cache import Phase, ProjectionCache
from ..rules import apollo as rule
from .matrix import GRADIENT, LOW_RANK, NORMALIZED, Matrix

# How many gradient elements a batch may have, which bounds the memory that converted gradients take, and how many
# low-rank numbers a chunk of it, which bounds that of R: on CPU so that R stays in the cache until its norms are taken.
_ELEMENTS = {"cpu": 1 << 25}
_NUMBERS = {"cpu": 1 << 18}
_ACCELERATOR = 1 << 26

# The gradients of a batch's matrices: for each the tiles' views, or None where a matrix has no gradient.
Gradients = list[list[Tensor] | None]

# A tensor, or its norm, and where its square belongs: the matrix in its batch, and the column of the norm terms.
_Norm = tuple[Tensor, int, int]


class Batch:
    """Consecutive matrices of a shard group with one parameter group, rank and dtype.

    Args:
        matrices: at least one; their states' moments become views of this batch's.
        first: the place of the first one in the shard group.
    """

    def __init__(self, matrices: Sequence[Matrix], first: int) -> None:
        self.matrices, self.first = list(matrices), first
        self.counts = [m.channels.owned.count for m in matrices]
        ends = list(accumulate(self.counts))
        self._rows = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        spec, holding = matrices[0].spec, matrices[0].holding
        self._chunks = _runs([c * spec.rank for c in self.counts], _NUMBERS.get(holding.device.type, _ACCELERATOR))
        # The most channels in a chunk.
        self._most = max(sum(self.counts[chunk.start : chunk.stop]) for chunk in self._chunks)
        self._factory_kwargs: dict[str, Any] = {"dtype": holding.compute_dtype, "device": holding.device}
        self.exp_avg = torch.zeros((ends[-1], spec.rank), **self._factory_kwargs)
        self.exp_avg_sq = torch.zeros((ends[-1], spec.rank), **self._factory_kwargs)
        self.last_norm = torch.zeros(len(self.matrices), **self._factory_kwargs)
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
            active: for each matrix of the shard group whether it has a gradient.
        """
        return [m.gradients() if active[i] else None for i, m in enumerate(self.matrices, start=self.first)]

    def owner_step(
        self, grads: Gradients, projections: ProjectionCache, received: Sequence[Any], terms: Tensor
    ) -> Sequence[Tensor | None]:
        """Complete R over the owned channels, update their moments and write this rank's norm terms.

        Args:
            grads: of the batch's matrices; those without one are left alone.
            projections: of the shard group, in the current step.
            received: for each matrix of the shard group what ``Exchange.reduce_to_owners`` returned, or None.
            terms: (matrices of the shard group, TERMS), written in place.

        Returns:
            For each matrix of the batch its owned channels' scaling factors, (channels, 1); None with tensor scaling.
        """
        spec, group = self.matrices[0].spec, self.matrices[0].group
        # By channel the norms of R, of N, and of G where they are needed; zeros where there is no gradient.
        lengths = torch.zeros((2, self.exp_avg.shape[0]), **self._factory_kwargs) if spec.channel_scales else None
        of_grads = torch.empty(self.exp_avg.shape[0], **self._factory_kwargs) if spec.channel_norms else None
        nothing = [None] * len(self.matrices)
        own: Sequence[Tensor | None] = nothing if of_grads is None else torch.split(of_grads, self.counts)
        norms: list[_Norm] = []
        # R and N of one chunk at a time, in the same memory.
        space = torch.empty((2, self._most, spec.rank), **self._factory_kwargs)
        for chunk in self._chunks:
            counts = self.counts[chunk.start : chunk.stop]
            places = torch.split(space[:, : sum(counts)], counts, dim=1)
            parts = self._low_rank(chunk, grads, projections, received, places, own)
            for rows, local in self._active_rows(chunk, grads):
                low_rank, normalized = space[:, local].unbind()
                moments = self.exp_avg[rows], self.exp_avg_sq[rows]
                rule.normalize(*moments, low_rank, normalized, betas=group["betas"], eps=group["eps"])
                if lengths is not None:
                    # One by one: threads divide the rows of a call, and here each meets those that it has just written.
                    # To fetch them from another core's cache would cost an eighth of the step.
                    torch.linalg.vector_norm(low_rank, dim=1, out=lengths[0, rows])
                    torch.linalg.vector_norm(normalized, dim=1, out=lengths[1, rows])
            norms += _norms(parts)
        mine = terms[self.first : self.first + len(self.matrices)]
        if lengths is None:
            _add_squares(norms, mine)
            return nothing
        scale = rule.channel_scale(lengths[1], lengths[0])
        if of_grads is not None:
            # The norm over a matrix's channels of s_c ||G_c|| is ||U||.
            parts = [(part, k, GRADIENT) for k, part in enumerate(torch.split(of_grads.mul_(scale), self.counts))]
            _add_squares(_norms([part for part in parts if grads[part[1]] is not None]), mine)
        return torch.split(scale[:, None], self.counts)

    def _low_rank(
        self,
        chunk: range,
        grads: Gradients,
        projections: ProjectionCache,
        received: Sequence[Any],
        places: Sequence[Tensor],
        norms: Sequence[Tensor | None],
    ) -> list[_Norm]:
        """R of some of the matrices, each into its place, (2, channels, r), where N is to come beside it.

        Writes the norms of G by channel into ``norms``, one tensor a matrix. With tensor scaling it returns instead
        what the norms of N, R and G are to be taken of, once N is there.
        """
        spec = self.matrices[0].spec
        parts: list[_Norm] = []
        lines: list[_Norm] = []
        for k, place in zip(chunk, places, strict=True):
            grad, own = grads[k], norms[k]
            if grad is None:
                continue
            low_rank, normalized = place.unbind()
            place_in_unit = self.first + k
            projection = projections.of(place_in_unit, Phase.OWN)
            self.matrices[k].complete(grad, low_rank, own, projection, received[place_in_unit])
            if not spec.channel_scales:
                parts += [(normalized, k, NORMALIZED), (low_rank, k, LOW_RANK)]
                if GRADIENT in spec.terms:  # now, while the gradient is in the cache
                    lines += [(rule.line_norms(tile), k, GRADIENT) for tile in grad]
        # By column, so that matrices that follow each other are added together.
        return [*parts[::2], *parts[1::2], *lines]

    def finish(
        self, grads: Gradients, owned: Sequence[Tensor | None], replies: Sequence[Tensor | None], terms: Tensor
    ) -> None:
        """Tensor scaling, limiter and update of the local weights.

        Args:
            grads: of the batch's matrices.
            owned: what ``owner_step`` returned, for each matrix of the shard group.
            replies: for each matrix of the shard group the scaling factors from exchange 2, or None.
            terms: (matrices of the shard group, TERMS), summed over ranks.
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
        active = [(k, grad) for k, grad in enumerate(grads) if grad is not None]
        factors = factor.unbind()
        by = [factors[k] for k, _ in active]
        if spec.channel_scales and active:
            scales = [self.matrices[k].held_scale(owned[self.first + k], replies[self.first + k]) for k, _ in active]
            by = list(torch._foreach_mul(scales, by))
        for (k, grad), coefficient in zip(active, by, strict=True):
            self.matrices[k].apply(grad, coefficient)

    def _active_rows(self, chunk: range, grads: Gradients) -> list[tuple[slice, slice]]:
        """The rows of a chunk's matrices with a gradient, neighbours merged; in the batch, and in the chunk."""
        runs: list[slice] = []
        for k in chunk:
            rows = self._rows[k]
            if grads[k] is None or rows.start == rows.stop:
                continue
            if runs and runs[-1].stop == rows.start:
                runs[-1] = slice(runs[-1].start, rows.stop)
            else:
                runs.append(rows)
        start = self._rows[chunk[0]].start
        return [(rows, slice(rows.start - start, rows.stop - start)) for rows in runs]


def _norms(parts: list[_Norm]) -> list[_Norm]:
    """The norms of tensors, as scalars; empty ones are left out."""
    parts = [part for part in parts if part[0].numel()]
    if not parts:
        return []
    norms = torch._foreach_norm([tensor for tensor, _, _ in parts])
    return [(norm, k, column) for norm, (_, k, column) in zip(norms, parts, strict=True)]


def _add_squares(norms: list[_Norm], out: Tensor) -> None:
    """Add the squares of scalars to ``out``, (matrices, TERMS), in order."""
    if not norms:
        return
    squares = torch.stack([norm for norm, _, _ in norms]).square_()
    first = 0
    for last, ((_, k, column), following) in enumerate(zip(norms, [*norms[1:], None], strict=True), start=1):
        if following is not None and following[1:] == (k + 1, column):
            continue  # the next matrix of the same column is added together with this one
        out[k + 1 - (last - first) : k + 1, column] += squares[first:last]
        first = last


def make_batches(matrices: Sequence[Matrix]) -> list[Batch]:
    """Divide a shard group's matrices, in order, into batches."""
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
