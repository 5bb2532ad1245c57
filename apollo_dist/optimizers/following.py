"""What trains an optimizer's parameters, the model or the DeepSpeed engine, and what becomes of them between steps."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import rank_of, world_of
from ..sharding import detect
from ..sharding.deepspeed import zero
from ..sharding.names import canonical_name
from .model_changes import (
    Change,
    Planned,
    Watch,
    any_trains,
    check_bare,
    check_outside,
    check_reduced,
    check_removed,
    check_updated,
    converted,
    planned,
    tell_new,
)
from .model_ref import ModelRef, check_not_replaced, find_model

if TYPE_CHECKING:
    from ..step.plan import StepPlan
    from .members import Members

logger = logging.getLogger("apollo_dist")


class Following:
    """Parameters that may be named, replaced, frozen or trained after their optimizer was built.

    Args:
        model: whose parameters they are; None where it is not known.
        members: the parameters.
        process_group: of the ranks that train them.

    Attributes:
        model: as far as it is known.
        engine: DeepSpeed's part in the steps, where a user has named the engine.
        driver: the DeepSpeed engine that is built around the optimizer.
        unreduced: names of parameters whose gradients ranks have yet to compare.
    """

    def __init__(self, model: nn.Module | None, members: Members, process_group: dist.ProcessGroup | None) -> None:
        self.model = ModelRef(model)
        self.engine: zero.Engine | None = None
        self.driver: weakref.ref[Any] | None = None
        self._members, self._group = members, process_group
        self.forget()

    def forget(self) -> None:
        """Forget what was looked at when steps were planned."""
        # Parameters that are frozen and have no state; and those that DeepSpeed does not update, with names.
        self._idle: list[Tensor] = []
        self._outside: list[tuple[str, Tensor]] = []
        # The model's parameters that DeepSpeed updates; and without it those that train.
        self._updated: list[tuple[str, Tensor]] = []
        self._planned: list[Planned] = []
        # Frozen parameters of the model that are in no group.
        self._unheld: list[tuple[str, Tensor]] = []
        # By their names in the model that was found for them, parameters that came without one; None before a look.
        self._bare: dict[str, Tensor] | None = None
        self.watch: Watch | None = None
        self.unreduced: set[str] = set()

    def driven_by(self, engine: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Note the DeepSpeed engine that is being built around the optimizer; the groups that it can take."""
        self.driver = weakref.ref(engine)
        trained = [group for group in groups if any_trains(group["params"])]
        if not engine.zero_optimization() or not 0 < len(trained) < len(groups):
            return list(groups)
        # ZeRO holds nothing of what is frozen now, and cannot take a group of which nothing is left.
        if rank_of() == 0:
            dropped = len(groups) - len(trained)
            logger.info("%d parameter groups hold frozen parameters only: DeepSpeed gets the others", dropped)
        return trained

    def find_engine(self, optimizer: Any) -> zero.Engine:
        """DeepSpeed's part in a step of ``optimizer``."""
        if self.engine is not None:
            return self.engine
        driver = None if self.driver is None else self.driver()
        if driver is None:
            return zero.find(optimizer)
        # While it builds FP16_UnfusedOptimizer the engine has no optimizer yet.
        built = driver.__dict__.get("optimizer") is not None
        return zero.from_engine(driver, optimizer) if built else zero.Engine(warming_up=True)

    def follow(self, groups: Sequence[dict[str, Any]], *, strict: bool = False) -> None:
        """Take the model's parameters and names; may fail on one rank only.

        Args:
            groups: of the optimizer; parameters are exchanged in place.
            strict: refuse parameters that the model does not have.
        """
        self.model.check(None)
        self._members.replace(self.model.follow(groups, self._members.infos, strict=strict), groups)

    def before_plan(self, groups: Sequence[dict[str, Any]], engine: zero.Engine) -> bool:
        """Take the parameters that the model has now, and say whether; local, may fail on one rank only."""
        if engine.wrapper is None and self.model.module is not None:
            self.follow(groups)
            return True
        if engine.wrapper is None:
            check_not_replaced(self._members.given)
        return False

    def look(self) -> Change:
        """Before a step that was planned: what became of the model since.

        Raises:
            ValueError: for what the optimizer cannot follow.
        """
        check_outside(self._outside)
        change = Change.PLAN_ANEW if converted(self._planned) or any_trains(self._idle) else Change.NONE
        if any_trains(p for _, p in self._unheld):
            tell_new(self._unheld)
            self._unheld = []
        if self.watch is not None and self.watch.changed() and self._replaced(self.watch):
            return Change.FOLLOW
        return change

    def has_idle(self) -> bool:
        """Whether parameters were frozen, and without state, when steps were planned."""
        return bool(self._idle)

    def _replaced(self, watch: Watch) -> bool:
        """Whether modules of the model, which have changed, have other parameters in the places of the optimizer's."""
        model = watch.model()
        if model is None:
            self.watch = None
            return False
        detect.reshard(model)  # FSDP may show gathered parameters in the places of its own
        if not watch.changed():
            return False
        if model is not self.model.module:
            check_updated(model, self._updated)
            check_bare(model, self._bare or {})
            self.watch = Watch(model)
            return False
        removed, moved, new = self.model.changes(self._members.given, self._members.infos, watch.parameters)
        self.watch = Watch(model)
        # Every rank has the same model. Only where its parameters changed is there a collective to come.
        check_removed(removed, new)
        return bool(moved)

    def note(self, engine: zero.Engine, built: StepPlan) -> None:
        """After planning: what to look at before later steps."""
        members = self._members
        self._idle, self._outside = [p for _, p, _ in built.idle], []
        model = self.model.module if engine.module is None else engine.module
        if engine.wrapper is not None and engine.module is not None:
            updated = zero.updated(engine.wrapper)
            self._outside = [
                (canonical_name(name), p)
                for name, p in engine.module.named_parameters()
                if id(p) not in updated and (id(p) in members.infos or not p.requires_grad)
            ]
            check_outside(self._outside)
            self._updated = [
                (canonical_name(name), p) for name, p in engine.module.named_parameters() if id(p) in updated
            ]
        if engine.wrapper is None and model is None and self._bare is None:
            model = find_model(members.given)
            ours = set(map(id, members.given))
            named = () if model is None else model.named_parameters()
            self._bare = {name: p for name, p in named if id(p) in ours}
            self.watch = None if model is None else Watch(model)
        elif model is not None and (engine.wrapper is not None or model is self.model.module):
            self.watch = Watch(model)
            self._unheld = [
                (canonical_name(name), p)
                for name, p in model.named_parameters()
                if engine.wrapper is None and id(p) not in members.infos and not p.requires_grad
            ]
        if engine.wrapper is None:
            self._planned = [planned(h.name, p) for (h, _), p in zip(built.shards, built.tensors, strict=True)]
        if world_of(self._group) > 1:
            self.unreduced |= members.frozen_once.intersection(shard.name for shard, _ in built.shards)
            members.frozen_once.difference_update(self.unreduced)
            members.frozen_once.update(name for name, _, _ in built.idle)

    def check_reduced(self, built: StepPlan) -> None:
        """Compare gradients of parameters that were frozen once: the engine may not reduce them. A collective."""
        shards = [shard for shard, _ in built.shards]
        self.unreduced = check_reduced(shards, self.unreduced, self._group)
