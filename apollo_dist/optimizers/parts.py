"""What an optimizer consists of, beside its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..step.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch.distributed as dist

    from ..rules.base import Rules
    from ..step.failures import Failures
    from ..step.nonfinite import NonFiniteGuard
    from .following import Following
    from .members import Members
    from .option_changes import OptionChanges
    from .plans import Plans
    from .state_store import StateStore


@dataclass(frozen=True)
class Parts:
    """Objects for one question each, which know each other as far as they ask each other.

    Attributes:
        rules: of groups that name none.
        title: the optimizer's name, for messages.
        group: of the ranks that step together; None for all.
        members: its parameters.
        following: what trains them.
        store: its state.
        plans: the plans of its steps.
        changes: what becomes of options that are changed in a group.
        guard: whether a step is to be skipped.
        failures: what is known about failed steps.
    """

    rules: Rules
    title: str
    group: dist.ProcessGroup | None
    members: Members
    following: Following
    store: StateStore
    plans: Plans
    changes: OptionChanges
    guard: NonFiniteGuard
    failures: Failures

    def facts(self, groups: Sequence[dict[str, Any]], seed: int) -> dict[str, object]:
        """What ranks must have in common about groups."""
        facts = {**self.guard.facts(), "embeddings": self.members.choice.embeddings}
        return facts | fingerprint(seed, groups, self.members.of(groups), self.rules)

    def show(self, groups: Iterable[dict[str, Any]]) -> None:
        """Fill the optimizer's ``state`` for other tools to look at."""
        self.store.show(self.plans.built.values(), (p for group in groups for p in group["params"]))
