"""Parameters that an element rule updates: each rank's own elements, without any exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..state.slots import Slot, ready
from .apply import decay

if TYPE_CHECKING:
    from ..rules.base import ElementRule
    from ..sharding.local_shard import LocalShard


class ElementwiseTensor:
    """The elements that this rank holds of one parameter, flat, with the rule's state of them.

    Attributes:
        state: ``step`` (int), and by the rule's names (elements,).
        names: of the state.
    """

    def __init__(self, shard: LocalShard, rule: ElementRule, group: Mapping[str, Any], state: Slot) -> None:
        self.shard, self.rule, self.group, self.state = shard, rule, group, state
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
        """The local gradient, (elements held here,), in the compute dtype; ValueError if it is sparse."""
        grad = self.shard.grad()
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"{self.shard.name} has a sparse gradient, which is not supported")
        return grad.detach().reshape(-1).to(self.shard.compute_dtype)


def step_elementwise(tensors: list[ElementwiseTensor]) -> None:
    """One step of all tensors, in batches that share rule, hyperparameters and number of steps."""
    batches: dict[tuple[Any, ...], list[ElementwiseTensor]] = {}
    for t in tensors:
        if t.begin_step():
            key = (id(t.rule), id(t.group), t.state["step"], t.shard.device, t.shard.compute_dtype)
            batches.setdefault(key, []).append(t)
    for batch in batches.values():
        group, rule = batch[0].group, batch[0].rule
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
