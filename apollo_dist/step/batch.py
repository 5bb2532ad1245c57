"""Neighbouring matrices whose state lies in one tensor, so that the rule runs over all their channels at once.

A rule's arithmetic at the owners is on small tensors: a model has hundreds of matrices, and with rank 1 each has a few
thousand numbers of state. One call for each matrix and operation would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.transfer import to_device
from ..state.slots import STEP

if TYPE_CHECKING:
    from .matrix import Matrix

# How many gradient elements a batch may have, which bounds the memory that converted gradients take, and how many
# low-rank numbers a chunk of it, which bounds that of R: on CPU so that R stays in the cache until its norms are taken;
# on accelerators with what P takes, which is generated for all of a chunk.
_ELEMENTS = {"cpu": 1 << 25}
_NUMBERS = {"cpu": 1 << 18}
_ACCELERATOR = 1 << 26

# Gradients or carriers of a batch's matrices: for each the tiles' views, or None where a matrix has no gradient.
Tiles = list[list[Tensor] | None]


class Batch:
    """Consecutive matrices of a shard group with one parameter group, rule, declaration and dtype.

    Args:
        matrices: at least one; their states become views of this batch's.
        first: the place of the first one in the shard group.

    Attributes:
        counts, rows: of each matrix how many channels this rank owns, and which rows of the batch's state they are.
        kernels: what its steps compute with.
        chunks: which matrices are reduced together.
        channel_state: by name, (owned channels of all matrices, width).
        matrix_state: by name, (matrices,).
        inverse_roots: one over the root of the number of elements of each channel, (channels,); None where the rule
            does not ask for roots of mean squares.
    """

    def __init__(self, matrices: Sequence[Matrix], first: int) -> None:
        self.matrices, self.first = list(matrices), first
        self.rule, self.declared, self.group = matrices[0].rule, matrices[0].declared, matrices[0].group
        self.kernels = matrices[0].kernels
        self.factory_kwargs: dict[str, Any] = matrices[0].factory_kwargs
        self.counts = [m.channels.owned.count for m in matrices]
        ends = list(accumulate(self.counts))
        self.channels = ends[-1]
        self.rows = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        device = matrices[0].shard.device.type
        rank = self.declared.reduce.low_rank
        numbers = [count * rank for count in self.counts]
        if device not in _NUMBERS:
            slices = [m.projection_slice for m in matrices]
            numbers = [n + s.length * rank * s.dtype.itemsize // 4 for n, s in zip(numbers, slices, strict=True)]
        self.chunks = runs_of(numbers, _NUMBERS.get(device, _ACCELERATOR))
        state = self.declared.state
        self.channel_state = {
            name: torch.zeros((self.channels, width), **self.factory_kwargs) for name, width in state.channel.items()
        }
        self.matrix_state = {name: torch.zeros(len(self.matrices), **self.factory_kwargs) for name in state.matrix}
        for i, (m, rows) in enumerate(zip(self.matrices, self.rows, strict=True)):
            places = {name: values[rows] for name, values in self.channel_state.items()}
            places |= {name: values[i] for name, values in self.matrix_state.items()}
            for name, place in places.items():
                place.copy_(m.state[name])
            m.state.update(places)

        self.inverse_roots: Tensor | None = None
        if self.declared.reduce.root_mean_square:
            lengths = [m.spec.n if m.spec.by_rows else m.spec.m for m in self.matrices]
            roots = [
                torch.full((c,), n**-0.5, **self.factory_kwargs) for c, n in zip(self.counts, lengths, strict=True)
            ]
            self.inverse_roots = torch.cat(roots)

    def reduced(self, active: Sequence[bool]) -> Tiles:
        """What is reduced, in a dtype that the kernels take; None for matrices that are not active.

        Args:
            active: for each matrix of the shard group whether it has a gradient.
        """
        return [
            [m.taken(tile) for tile in m.reduced()] if active[i] else None
            for i, m in enumerate(self.matrices, start=self.first)
        ]

    def carriers(self, active: Sequence[bool], reduced: Tiles | None = None) -> Tiles:
        """The carriers in a dtype that the kernels take; None for matrices that are not active.

        Args:
            active: for each matrix of the shard group whether it has a gradient.
            reduced: what ``reduced`` returned, which is not converted again where it is the carriers.
        """
        if reduced is not None and self.matrices[0].reduces_carrier:
            return reduced
        return [m.carriers() if active[i] else None for i, m in enumerate(self.matrices, start=self.first)]

    def active_runs(self, chunk: range, grads: Tiles) -> list[tuple[list[int], slice]]:
        """The matrices of a chunk that have a gradient and owned channels, by runs of neighbouring rows.

        For a rule that reads the step those of a run have taken equally many.
        """
        runs: list[tuple[list[int], slice]] = []
        for k in chunk:
            rows = self.rows[k]
            if grads[k] is None or rows.start == rows.stop:
                continue
            alike = not self.rule.reads_step or (runs and self._step(runs[-1][0][0]) == self._step(k))
            if runs and runs[-1][1].stop == rows.start and alike:
                runs[-1] = [*runs[-1][0], k], slice(runs[-1][1].start, rows.stop)
            else:
                runs.append(([k], rows))
        return runs

    @property
    def here(self) -> slice:
        """The places of the matrices in the shard group."""
        return slice(self.first, self.first + len(self.matrices))

    def factors(self, moved: Sequence[bool], terms: Tensor) -> Tensor | None:
        """The factor of each matrix by its rule, (matrices,), or None for 1; the state of those that move changes.

        Args:
            moved: for each matrix of the batch whether it has a gradient.
            terms: (matrices of the shard group, columns), summed over ranks.
        """
        factor, changed = self.rule.matrix_step(terms[self.here, : self.declared.terms], self.matrix_state, self.group)
        for name, values in changed.items():
            if not all(moved):
                values = torch.where(to_device(list(moved), torch.bool, values.device), values, self.matrix_state[name])
            self.matrix_state[name].copy_(values)
        return factor

    def state_of(self, rows: slice) -> dict[str, Tensor]:
        """The state of some owned channels, by name (channels, width)."""
        return {name: values[rows] for name, values in self.channel_state.items()}

    def _step(self, k: int) -> int:
        step: int = self.matrices[k].state[STEP]
        return step


def make_batches(matrices: Sequence[Matrix]) -> list[Batch]:
    """Divide a shard group's matrices, in order, into batches."""
    sizes = [m.numel for m in matrices]
    # Nothing is converted where kernels take gradients as they are stored.
    together = all(m.kernels.together for m in matrices)
    limit = sum(sizes) if together else _ELEMENTS.get(matrices[0].shard.device.type, _ACCELERATOR)
    runs = runs_of(sizes, limit, lambda i, j: _alike(matrices[i], matrices[j]))
    return [Batch([matrices[i] for i in run], run[0]) for run in runs]


def runs_of(sizes: Sequence[int], limit: int, alike: Callable[[int, int], bool] = lambda i, j: True) -> list[range]:
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
    same_rule = a.group is b.group and a.rule is b.rule and a.declared == b.declared and a.kernels is b.kernels
    return same_rule and a.shard.compute_dtype == b.shard.compute_dtype
