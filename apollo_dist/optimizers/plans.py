"""The plans of an optimizer's steps: made at the first step, agreed on by all ranks, kept until parameters change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..distributed import check_same_on_all_ranks, run_together, together
from ..rules.groups import STOCHASTIC_ROUNDING
from ..rules.registry import RULE, rules_of
from ..sharding import detect
from ..sharding.deepspeed import zero, zero_engine
from ..step.fingerprint import explain
from .model_changes import Change
from .model_ref import ModelRef

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..step.failing import Steps
    from ..step.nonfinite import NonFiniteGuard
    from ..step.plan import StepPlan
    from .following import Following
    from .members import Members
    from .state_store import StateStore

logger = logging.getLogger("apollo_dist")

Group = dict[str, Any]


class Settings(NamedTuple):
    """What an optimizer's steps are planned with, beside its groups: as the arguments of ``ShardedOptimizer``."""

    seed: int
    cache_projection: bool | str
    kernels: str


class Plans:
    """What each call of ``step()`` works on.

    Args:
        rules: of groups that name none.
        members, following, store, guard, process_group: of the optimizer.
        plan: ``step.plan.plan_step``.
        steps: makes, of shard groups and other tensors, what takes their steps.

    Attributes:
        built: the plans by what they were made of; under ZeRO-3 one for each sub-group.
    """

    def __init__(
        self, rules: Rules, members: Members, following: Following, store: StateStore, guard: NonFiniteGuard,
        process_group: dist.ProcessGroup | None, plan: Callable[..., StepPlan], steps: Callable[..., Steps],
    ) -> None:  # fmt: skip
        self._rules, self._members, self._following, self._store = rules, members, following, store
        self._guard, self._group, self._plan_step, self._steps = guard, process_group, plan, steps
        self.built: dict[tuple[Any, ...], StepPlan] = {}

    def forget(self) -> None:
        """Make new plans at the next step."""
        self.built = {}

    def expect_state(self, names: Set[str]) -> None:
        """Have state for these parameters in the next plan, also while they are frozen."""
        if not names <= self._store.trained.keys():
            self._store.begin(names)
            if self._following.has_idle():
                self.forget()

    def look(self, groups: Sequence[Group], seed: int) -> None:
        """Follow what became of the model since plans were made; the next step makes new ones where that matters."""
        if not self.built:
            return
        change = self._following.look()
        if change is Change.FOLLOW:
            run_together(lambda: self.follow(groups, seed), self._group)
        elif change is Change.PLAN_ANEW:
            self.forget()

    def follow(self, groups: Sequence[Group], seed: int, *, strict: bool = False) -> None:
        """Take the model's parameters and names; may fail on one rank only."""
        self._following.follow(groups, strict=strict)
        self._store.identify(groups, seed)
        self.forget()

    def attach(self, model: nn.Module, groups: Sequence[Group], seed: int, strict: bool) -> None:
        """Take a model for that of the parameters; may fail on one rank only.

        Raises:
            ValueError: if parameters without names have state already, or, if it is ``strict``, are not the model's.
        """
        if self._store.slots and not self._members.named:
            raise ValueError(
                "attach comes before the first step: parameters that came without names have state by now, and "
                "projections that belong to their places in the list and not to their names in the model"
            )
        self._following.model = ModelRef(model)
        self.follow(groups, seed, strict=strict)

    def current(self, optimizer: Any, groups: Sequence[Group], settings: Settings) -> StepPlan | None:
        """What this step works on, built anew when the parameters or their structure changed.

        None in the step with zero gradients that DeepSpeed makes while it builds FP16_UnfusedOptimizer.

        Args:
            optimizer: whose step it is, by which DeepSpeed's engine is found.
            groups: its ``param_groups``, in this call of ``step()``.
            settings: its settings.
        """
        self.look(groups, settings.seed)
        key = self._key(groups)
        if key in self.built:
            return self.built[key]
        engine = self._following.find_engine(optimizer)
        if engine.warming_up:
            return None
        # States that are made while this fails, on this rank or on another one, may be incomplete.
        slots = dict(self._store.slots)
        try:
            made = self._agreed(groups, settings, engine)
        except BaseException:
            # Plans of before may no longer share the tensors of these slots.
            self._store.slots = slots
            self.forget()
            raise
        self._store.show(self.built.values(), (p for group in groups for p in group["params"]))
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.info("%s: %s", type(optimizer).__name__, made.summary())
        return made

    def _agreed(self, groups: Sequence[Group], settings: Settings, engine: zero.Engine) -> StepPlan:
        """A new plan that all ranks agree on, with the state that was loaded; a collective."""
        store = self._store
        run_together(lambda: self._before(groups, settings.seed, engine), self._group)
        detect.make_groups((p for group in groups for p in group["params"]), self._group)
        made = run_together(lambda: self._plan(groups, settings, engine), self._group)
        check_same_on_all_ranks(made.facts, self._group, explain(self._group))
        # A plan of the same parameters under other tensors is out of date.
        names = made.names()
        store.begin(shard.name for shard, _ in made.shards)
        store.generation += 1
        others = {k: plan for k, plan in self.built.items() if names.isdisjoint(plan.names())}
        with together(self._group):
            store.adopt(made, by_parameter=engine.wrapper is None and engine.driver is None)
        self.built = {**others, self._key(groups): made}
        run_together(lambda: self._following.note(engine, made), self._group)
        return made

    def _before(self, groups: Sequence[Group], seed: int, engine: zero.Engine) -> None:
        """Take the parameters that the model has now; local, may fail on one rank only."""
        if self._following.before_plan(groups, engine):
            self._store.identify(groups, seed)
            self.forget()

    def _plan(self, groups: Sequence[Group], settings: Settings, engine: zero.Engine) -> StepPlan:
        """The local part of planning; may fail on one rank only."""
        model = self._following.model.module
        if self._guard.enabled:
            zero_engine.check_skips(engine.wrapper)
        if engine.module is None:
            engine = replace(engine, module=model)
        made = self._plan_step(
            groups,
            self._members.infos,
            engine,
            self._store.slot_source(),
            self._rules,
            lambda names, found: self._members.decide(groups, names, found, model),
            self._members.roles.of,
            trained=self._store.trained,
            generation=self._store.generation,
            **settings._asdict(),
        )
        made.steps = self._steps(made.shard_groups, made.elementwise)
        return made

    def _key(self, groups: Sequence[Group]) -> tuple[Any, ...]:
        # With the groups' own ids, since a plan reads their hyperparameters. Under ZeRO-3 each sub-group has a plan,
        # and at each call one group holds its flat tensor and the others are empty.
        # Options without a value are refused when the changes of options are looked at.
        return tuple(
            (
                id(group),
                tuple(map(id, group["params"])),
                group.get(RULE),
                group.get(STOCHASTIC_ROUNDING),
                *(group.get(key) for key in rules_of(group, self._rules).spec_options),
            )
            for group in groups
        )
