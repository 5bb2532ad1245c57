"""Parameters that an element rule updates: each rank's own elements, without any exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.parts import AdamWPart
from ..kernels.table import Kernels, torch_kernels
from ..kernels.transfer import to_device
from ..state.slots import Slot, ready
from .apply import decay
from .rows import flat_windows

if TYPE_CHECKING:
    from ..rules.base import ElementRule
    from ..sharding.local_shard import LocalShard


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
            {"dtype": shard.compute_dtype, "device": shard.device},
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

    @property
    def _as_adam(self) -> bool:
        return self.kernels.adamw is not None and self.rule.adam(1, self.group) is not None


def step_elementwise(tensors: list[ElementwiseTensor]) -> None:
    """One step of all tensors, in batches that share rule, hyperparameters and number of steps."""
    batches: dict[tuple[Any, ...], list[ElementwiseTensor]] = {}
    for t in tensors:
        if t.begin_step():
            key = (id(t.rule), id(t.group), t.state["step"], t.shard.device, t.shard.compute_dtype, t.kernels)
            batches.setdefault(key, []).append(t)
    for batch in batches.values():
        dense = [t for t in batch if t.shard.rows is None]
        if dense:
            _step_dense(dense)
        for t in batch:
            if t.shard.rows is not None:
                _step_rows(t)


def _step_dense(batch: list[ElementwiseTensor]) -> None:
    """One step of tensors that are stored as one number an element."""
    group, rule = batch[0].group, batch[0].rule
    form = rule.adam(batch[0].state["step"], group)
    if batch[0].kernels.adamw is not None and form is not None:
        _step_adam(batch, *form)
        return
    weights = [t.shard.weight() for t in batch]
    work = [w.reshape(-1).to(t.shard.compute_dtype) for w, t in zip(weights, batch, strict=True)]
    if rule.decay_first:
        decay(work, rule.learning_rate(group), rule.weight_decay(group))
    state = {name: [t.state[name] for t in batch] for name in batch[0].names}
    rule.update(work, [t.gradient() for t in batch], state, batch[0].state["step"], group)
    if not rule.decay_first:
        decay(work, rule.learning_rate(group), rule.weight_decay(group))
    for stored, updated in zip(weights, work, strict=True):
        if updated.data_ptr() != stored.data_ptr():
            stored.copy_(updated.view(stored.shape))


def _step_rows(t: ElementwiseTensor) -> None:
    """One step of a tensor that is stored by rows, some of them at a time."""
    group, rule, step = t.group, t.rule, t.state["step"]
    grad = t.shard.grad()
    assert grad is not None
    grad = grad.detach().reshape(-1)
    for here, work in flat_windows(t.shard, step):
        if rule.decay_first:
            decay([work], rule.learning_rate(group), rule.weight_decay(group))
        gradient = grad[here].to(work.dtype)
        rule.update([work], [gradient], {name: [t.state[name][here]] for name in t.names}, step, group)
        if not rule.decay_first:
            decay([work], rule.learning_rate(group), rule.weight_decay(group))


def _step_adam(batch: list[ElementwiseTensor], correction: float, eps: float) -> None:
    """One step of tensors that share rule, hyperparameters and number of steps, in one pass over each.

    Args:
        batch: of a rule that is Adam's.
        correction, eps: what ``ElementRule.adam`` returned.
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
    parts = [
        AdamWPart(weight, t.gradient(), *(t.state[name] for name in t.names))
        for weight, t in zip(flat, batch, strict=True)
    ]
    kernel = batch[0].kernels.adamw
    assert kernel is not None
    kernel(parts, coefficients, betas=group["betas"], eps=eps, maximize=group["maximize"], decay_first=rule.decay_first)
    for weight, updated in zip(stored, flat, strict=True):
        if updated.data_ptr() != weight.data_ptr():  # a copy of weights that do not lie in one piece
            weight.copy_(updated.view(weight.shape))
