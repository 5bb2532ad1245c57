"""Parameters that an element rule updates: each rank's own elements, without any exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.parts import AdamWPart
from ..kernels.rounding import WEIGHT, Rounding, key_of, round_into
from ..kernels.table import Kernels, torch_kernels
from ..kernels.transfer import to_device
from ..rules.groups import STOCHASTIC_ROUNDING
from ..sharding.spans import Span, spans_of
from ..state.slots import Slot, ready
from .apply import decay
from .rows import flat_windows

if TYPE_CHECKING:
    from ..rules.base import ElementRule
    from ..sharding.local_shard import LocalShard


# How many elements of a tensor in low precision are converted at a time; smaller ones are converted together.
_ELEMENTS = 1 << 24


class ElementwiseTensor:
    """The elements that this rank holds of one parameter, flat, with the rule's state of them.

    Attributes:
        state: ``step`` (int), and by the rule's names (elements,).
        names: of the state.
    """

    def __init__(
        self,
        shard: LocalShard,
        rule: ElementRule,
        group: Mapping[str, Any],
        state: Slot,
        kernels: Kernels | None = None,
    ) -> None:
        self.shard, self.rule, self.group, self.state = shard, rule, group, state
        self.kernels = torch_kernels() if kernels is None else kernels
        self.names = rule.state_of(group)
        ready(
            state,
            shard.name,
            dict.fromkeys(self.names, (shard.numel,)),
            {"dtype": rule.state_dtype(group) or shard.compute_dtype, "device": shard.device},
            shard.partition.signature(shard.group.rank),
        )

    def begin_step(self) -> bool:
        """Count the step if there is a gradient; without one the tensor is skipped."""
        if self.shard.grad() is None:
            return False
        self.state["step"] += 1
        return True

    def gradient(self) -> Tensor:
        """The local gradient, (elements held here,), in a dtype that its kernels take; ValueError if it is sparse."""
        grad = self.shard.grad()
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"{self.shard.name} has a sparse gradient, which is not supported")
        flat = grad.detach().reshape(-1)
        return flat if self._as_adam and flat.dtype in self.kernels.stored else flat.to(self.shard.compute_dtype)

    @cached_property
    def spans(self) -> list[Span]:
        """Where the local elements lie in the whole."""
        return spans_of(self.shard.partition.boxes(self.shard.group.rank, self.shard.shape), self.shard.shape)

    @property
    def rounds_weights(self) -> bool:
        """Whether new weights are rounded stochastically."""
        return bool(self.group[STOCHASTIC_ROUNDING]) and self.shard.in_bfloat16

    def rounding(self, span: Span, seed: int, stream: str = WEIGHT) -> Rounding:
        """Of the elements of a span, in this step."""
        step: int = self.state["step"]
        return Rounding(key_of(seed, self.shard.name, stream), step, span.first, (span.stride, 1))

    def write(self, out: Tensor, values: Tensor, seed: int, stream: str) -> None:
        """Write values of the local elements to ``out``, both flat, rounded stochastically."""
        for span in self.spans:
            round_into(span.view(out), span.view(values), self.rounding(span, seed, stream))

    @property
    def in_pieces(self) -> bool:
        """Whether only pieces of the tensor are converted at a time."""
        large = self.shard.numel > _ELEMENTS and self.shard.dtype != self.shard.compute_dtype
        return large and self.shard.weight().is_contiguous()

    @cached_property
    def pieces(self) -> list[Span]:
        """The local elements as short runs of elements that follow each other here and in the whole."""
        found = []
        for span in self.spans:
            joined = span.step == span.columns == span.stride or span.rows == 1
            runs = [(0, span.rows * span.columns)] if joined else [(row, span.columns) for row in range(span.rows)]
            for row, length in runs:
                for start in range(0, length, _ELEMENTS):
                    count = min(_ELEMENTS, length - start)
                    first, offset = span.first + row * span.stride + start, span.offset + row * span.step + start
                    found.append(Span(first, 1, count, count, offset, count))
        return found

    def write_rows(self, here: slice, values: Tensor, seed: int, name: str) -> None:
        """As ``write``, to a state of some rows of a tensor stored by rows; ``here`` are their local elements."""
        (span,) = self.spans  # whole rows, which follow each other here and in the whole
        piece = span._replace(first=span.first + here.start, rows=1, columns=len(values), stride=len(values))
        round_into(self.state[name][here][None], values[None], self.rounding(piece, seed, name))

    @property
    def _as_adam(self) -> bool:
        return self.kernels.adamw is not None and self.rule.adam(1, self.group) is not None


def step_elementwise(tensors: list[ElementwiseTensor], seed: int) -> None:
    """One step of all tensors, in batches that share rule, hyperparameters and number of steps.

    Args:
        tensors: on one or several devices, of any dtypes.
        seed: of stochastic rounding.
    """
    batches: dict[tuple[Any, ...], list[ElementwiseTensor]] = {}
    for t in tensors:
        if t.begin_step():
            key = (id(t.rule), id(t.group), t.state["step"], t.shard.device, t.shard.compute_dtype, t.kernels)
            batches.setdefault(key, []).append(t)
    for batch in batches.values():
        dense = [t for t in batch if t.shard.rows is None]
        if dense:
            _step_dense(dense, seed)
        for t in batch:
            if t.shard.rows is not None:
                _step_rows(t, seed)


def _step_dense(batch: list[ElementwiseTensor], seed: int) -> None:
    """One step of tensors that are stored as one number an element."""
    group, rule = batch[0].group, batch[0].rule
    form = rule.adam(batch[0].state["step"], group)
    if batch[0].kernels.adamw is not None and form is not None:
        _step_adam(batch, *form, seed)
        return
    large = [t for t in batch if t.in_pieces]
    for t in large:
        _step_pieces(t, seed)
    batch = [t for t in batch if not t.in_pieces]
    if not batch:
        return
    weights = [t.shard.weight() for t in batch]
    work = [w.reshape(-1).to(t.shard.compute_dtype) for w, t in zip(weights, batch, strict=True)]
    state = {name: [t.state[name].to(t.shard.compute_dtype) for t in batch] for name in batch[0].names}
    _advance(batch[0], work, lambda: [t.gradient() for t in batch], state)
    for t, stored, updated in zip(batch, weights, work, strict=True):
        _store(t, stored, updated, seed)
    for name, made in state.items():
        for t, values in zip(batch, made, strict=True):
            if values is not t.state[name]:
                t.write(t.state[name], values, seed, name)


def _advance(
    t: ElementwiseTensor, work: list[Tensor], gradients: Callable[[], list[Tensor]], state: dict[str, list[Tensor]]
) -> None:
    """Update weights and states in the compute dtype by the rule of ``t``, and decay them, before or afterwards."""
    group, rule = t.group, t.rule
    if rule.decay_first:
        decay(work, rule.learning_rate(group), rule.weight_decay(group))
    rule.update(work, gradients(), state, t.state["step"], group)
    if not rule.decay_first:
        decay(work, rule.learning_rate(group), rule.weight_decay(group))


def _advance_piece(t: ElementwiseTensor, work: Tensor, grad: Tensor, here: slice) -> dict[str, Tensor]:
    """The same for some elements of a tensor; their states in the compute dtype, which may be views of those kept."""
    state = {name: t.state[name][here].to(work.dtype) for name in t.names}
    gradient = grad[here].to(work.dtype)
    _advance(t, [work], lambda: [gradient], {name: [values] for name, values in state.items()})
    return state


def _step_pieces(t: ElementwiseTensor, seed: int) -> None:
    """One step of a large tensor in low precision, so that only pieces of it are converted at a time."""
    weight, grad = t.shard.weight(), t.shard.grad()
    assert grad is not None
    flat, grad = weight.view(-1), grad.detach().reshape(-1)
    for span in t.pieces:
        here = slice(span.offset, span.offset + span.columns)
        work = flat[here].to(t.shard.compute_dtype)
        state = _advance_piece(t, work, grad, here)
        if t.rounds_weights:
            round_into(flat[here][None], work[None], t.rounding(span, seed))
        else:
            flat[here].copy_(work)
        for name, values in state.items():
            if values.dtype != t.state[name].dtype:
                round_into(t.state[name][here][None], values[None], t.rounding(span, seed, name))


def _step_rows(t: ElementwiseTensor, seed: int) -> None:
    """One step of a tensor that is stored by rows, some of them at a time."""
    grad = t.shard.grad()
    assert grad is not None
    grad = grad.detach().reshape(-1)
    for here, work in flat_windows(t.shard, t.state["step"]):
        for name, values in _advance_piece(t, work, grad, here).items():
            if values.dtype != t.state[name].dtype:
                t.write_rows(here, values, seed, name)


def _store(t: ElementwiseTensor, stored: Tensor, updated: Tensor, seed: int) -> None:
    """Write new weights, flat and in any dtype, to where they are stored; nothing if they are there."""
    if updated.data_ptr() == stored.data_ptr():
        return
    if not t.rounds_weights or updated.dtype == stored.dtype:
        stored.copy_(updated.view(stored.shape))
        return
    flat = stored.reshape(-1)
    t.write(flat, updated, seed, WEIGHT)
    if flat.data_ptr() != stored.data_ptr():  # a copy of weights that do not lie in one piece
        stored.copy_(flat.view(stored.shape))


def _step_adam(batch: list[ElementwiseTensor], correction: float, eps: float, seed: int) -> None:
    """One step of tensors that share rule, hyperparameters and number of steps, in one pass over each.

    Args:
        batch: of a rule that is Adam's.
        correction, eps: what ``ElementRule.adam`` returned.
        seed: of stochastic rounding.
    """
    group, rule, shard = batch[0].group, batch[0].rule, batch[0].shard
    lr, weight_decay = rule.learning_rate(group), rule.weight_decay(group)
    if isinstance(lr, Tensor):
        rate = lr.reshape(()).to(shard.device, shard.compute_dtype, non_blocking=True)
        coefficients = torch.stack([rate * correction, 1.0 - rate * weight_decay])
    else:
        coefficients = to_device([lr * correction, 1.0 - lr * weight_decay], shard.compute_dtype, shard.device)
    stored = [t.shard.weight() for t in batch]
    flat = [weight.reshape(-1) for weight in stored]
    parts = [part for weight, t in zip(flat, batch, strict=True) for part in _parts(t, weight, seed)]
    kernel = batch[0].kernels.adamw
    assert kernel is not None
    kernel(parts, coefficients, betas=group["betas"], eps=eps, maximize=group["maximize"], decay_first=rule.decay_first)
    for weight, updated in zip(stored, flat, strict=True):
        if updated.data_ptr() != weight.data_ptr():  # a copy of weights that do not lie in one piece
            weight.copy_(updated.view(weight.shape))


def _parts(t: ElementwiseTensor, weight: Tensor, seed: int) -> Iterator[AdamWPart]:
    """A tensor as the kernel takes it: whole, or where it is rounded stochastically by pieces of the whole parameter.

    Args:
        t: the tensor.
        weight: its local weights, flat.
        seed: of stochastic rounding.
    """
    exp_avg, exp_avg_sq = t.names
    tensors = weight, t.gradient(), t.state[exp_avg], t.state[exp_avg_sq]
    rounds_moments = tensors[2].dtype == torch.bfloat16
    if not (t.rounds_weights or rounds_moments):
        yield AdamWPart(*tensors)
        return
    for span in t.spans:
        # Rows that do not follow each other in local memory are pieces of their own.
        rows = 1 if span.step != span.columns else span.rows
        for row in range(0, span.rows, rows):
            at, count = span.offset + row * span.step, rows * span.columns
            piece = span._replace(first=span.first + row * span.stride, rows=rows)
            both = t.rounding(piece, seed, exp_avg), t.rounding(piece, seed, exp_avg_sq)
            rounding = t.rounding(piece, seed) if t.rounds_weights else None
            w, g, m, v = (tensor[at : at + count] for tensor in tensors)
            yield AdamWPart(w, g, m, v, span.columns, rounding, both if rounds_moments else None)
