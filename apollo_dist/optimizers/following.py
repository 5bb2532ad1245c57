"""An optimizer that knows what trains its parameters: the model or the DeepSpeed engine, and what becomes of them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Set
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..distributed import rank_of, run_together, world_of
from ..sharding import detect
from ..sharding.deepspeed import zero, zero_engine
from ..sharding.names import canonical_name
from .attributes import OptimizerAttributes
from .model_changes import (
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
from .model_ref import ModelRef, find_model

if TYPE_CHECKING:
    from ..step.plan import StepPlan

logger = logging.getLogger("apollo_dist")


class FollowingOptimizer(OptimizerAttributes):
    """Parameters that may be named, replaced, frozen or trained after it was built."""

    def attach(self, engine: Any) -> None:
        """Name the DeepSpeed engine that drives this optimizer, or the model whose parameters it updates.

        An engine is found at the first step; attaching makes that explicit, and debuggable. A model names parameters
        that came without names, so that the choice and the projections are those of ``APOLLO(model)``; and where
        parameters were replaced in the model (by ``fully_shard``, by Accelerate) the optimizer follows, by name.
        ``Accelerator.prepare`` and the Hugging Face ``Trainer`` attach their model themselves.

        Args:
            engine: what ``deepspeed.initialize`` returned first, or the model, wrapped or not.

        Raises:
            ValueError: if the engine drives another optimizer, or a parameter is not the model's; on all ranks alike.
        """
        if isinstance(engine, nn.Module) and not zero_engine.is_engine(engine):
            self._attach_model(engine, strict=True)
        else:
            self._engine = zero.from_engine(engine, self)

    def driven_by(self, engine: Any) -> None:
        """Note the DeepSpeed engine that is being built around this optimizer; ``deepspeed.initialize`` calls it."""
        self._driver = weakref.ref(engine)
        groups = [group for group in self.param_groups if any_trains(group["params"])]
        if engine.zero_optimization() and 0 < len(groups) < len(self.param_groups):
            # ZeRO holds nothing of what is frozen now, and cannot take a group of which nothing is left.
            if rank_of() == 0:
                dropped = len(self.param_groups) - len(groups)
                logger.info("%d parameter groups hold frozen parameters only: DeepSpeed gets the others", dropped)
            self.param_groups[:] = groups
            self._option_changes.remember(groups)

    def _find_engine(self) -> zero.Engine:
        """DeepSpeed's part in this step."""
        if self._engine is not None:
            return cast(zero.Engine, self._engine)
        driver = None if self._driver is None else self._driver()
        if driver is None:
            return zero.find(self)
        # While it builds FP16_UnfusedOptimizer the engine has no optimizer yet.
        built = driver.__dict__.get("optimizer") is not None
        return zero.from_engine(driver, self) if built else zero.Engine(warming_up=True)

    def _attach_model(self, model: nn.Module, strict: bool) -> None:
        """``attach`` for a model; a collective."""

        def local() -> None:
            if self._slots and not all(m.named for m in self._members.values()):
                raise ValueError(
                    "attach comes before the first step: parameters that came without names have state by now, and "
                    "projections that belong to their places in the list and not to their names in the model"
                )
            self._model = ModelRef(model)
            self._follow(strict)

        run_together(local, self._process_group)

    def _follow(self, strict: bool = False) -> None:
        """Take the model's parameters and names; may fail on one rank only."""
        self._model.check(None)
        self._members = self._model.follow(self.param_groups, self._members, strict=strict)
        self._identify()
        self._given, self._builds = [p for group in self.param_groups for p in group["params"]], {}

    def expect_state(self, names: Set[str]) -> None:
        """Make state for these parameters at the next ``prepare`` or step, also while they are frozen.

        A checkpoint that has state of theirs is about to be loaded. All ranks must name the same.
        """
        if not names <= self._trained.keys():
            self._begin(names)
            self._builds = {} if self._idle else self._builds

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero; also those of parameters that took others' places in the model.

        A parameter that replaces another (``model.to`` may do that) keeps a copy of its gradient, to which the next
        backward pass would add.
        """
        if self._builds:
            self._look_at_model()
        super().zero_grad(set_to_none)

    def _look_at_model(self) -> None:
        """Before a step that was planned: follow what became of the model since, or refuse it."""
        check_outside(self._outside)
        if converted(self._planned) or any_trains(self._idle):
            self._builds = {}
        if any_trains(p for _, p in self._unheld):
            tell_new(self._unheld)
            self._unheld = []
        if self._watch is not None and self._watch.changed():
            self._after_change(self._watch)

    def _after_change(self, watch: Watch) -> None:
        """Modules of the model have other parameters or children: exchange those of ``param_groups`` by name."""
        model = watch.model()
        if model is None:
            self._watch = None
            return
        detect.reshard(model)  # FSDP may show gathered parameters in the places of its own
        if not watch.changed():
            return
        if model is not self._model.module:
            check_updated(model, self._updated)
            check_bare(model, self._bare or {})
            self._watch = Watch(model)
            return
        removed, moved, new = self._model.changes(self._given, self._members, watch.parameters)
        self._watch = Watch(model)
        # Every rank has the same model. Only where its parameters changed is there a collective to come.
        check_removed(removed, new)
        if moved:
            run_together(self._follow, self._process_group)

    def _note_model(self, engine: zero.Engine, built: StepPlan) -> None:
        """After planning: what to look at before later steps."""
        self._idle, self._outside = [p for _, p, _ in built.idle], []
        model = self._model.module if engine.module is None else engine.module
        if engine.wrapper is not None and engine.module is not None:
            updated = zero.updated(engine.wrapper)
            self._outside = [
                (canonical_name(name), p)
                for name, p in engine.module.named_parameters()
                if id(p) not in updated and (id(p) in self._members or not p.requires_grad)
            ]
            check_outside(self._outside)
            self._updated = [
                (canonical_name(name), p) for name, p in engine.module.named_parameters() if id(p) in updated
            ]
        if engine.wrapper is None and model is None and self._bare is None:
            model = find_model(self._given)
            ours = set(map(id, self._given))
            named = () if model is None else model.named_parameters()
            self._bare = {name: p for name, p in named if id(p) in ours}
            self._watch = None if model is None else Watch(model)
        elif model is not None and (engine.wrapper is not None or model is self._model.module):
            self._watch = Watch(model)
            self._unheld = [
                (canonical_name(name), p)
                for name, p in model.named_parameters()
                if engine.wrapper is None and id(p) not in self._members and not p.requires_grad
            ]
        if engine.wrapper is None:
            self._planned = [planned(h.name, p) for (h, _), p in zip(built.shards, built.tensors, strict=True)]
        if world_of(self._process_group) > 1:
            self._unreduced |= self._frozen_once.intersection(shard.name for shard, _ in built.shards)
            self._frozen_once.difference_update(self._unreduced)
            self._frozen_once.update(name for name, _, _ in built.idle)

    def _check_reduced(self, built: StepPlan) -> None:
        shards = [shard for shard, _ in built.shards]
        self._unreduced = check_reduced(shards, self._unreduced, self._process_group)

    def _release_parameters(self) -> None:
        """Hold no parameters, only their names: they are about to be replaced, and ``attach`` follows."""
        # Under keys that are no ids, since those of freed tensors are used again.
        self._members = {-1 - i: m for i, m in enumerate(self._members.values())}
        self._given, self._builds = [], {}
