"""A ``torch.optim.Optimizer`` for whole and sharded parameters: construction, steps, plans."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import check_same_on_all_ranks, run_together, together
from ..kernels.table import check as check_kernels
from ..rules.groups import options_of
from ..rules.registry import RULE, rules_of
from ..selection.choice import name_pattern
from ..selection.kept import KeptChoice
from ..selection.roles import KeptRoles
from ..sharding import detect, fsdp2
from ..sharding.deepspeed import zero, zero_engine
from ..state.callers import called_to_make_state
from ..step.failing import Steps
from ..step.failures import Failures
from ..step.fingerprint import fingerprint
from ..step.nonfinite import NonFiniteGuard
from ..step.plan import StepPlan, plan_step
from .following import FollowingOptimizer
from .grouped import GroupedOptimizer, as_groups, is_chosen, without_choice
from .model_ref import ModelRef, check_not_replaced
from .options import check_known, drop_other_keywords, make_plain, plain, validate_options
from .param_groups import chosen_groups
from .parameters import named_parameters
from .picklable import PicklableOptimizer
from .stateful import StatefulOptimizer

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..sharding.parameters import ParamInfo

logger = logging.getLogger("apollo_dist")

_ARGUMENTS = (
    "seed", "exclude", "cache_projection", "kernels", "skip_nonfinite", "max_skipped_steps", "model",
    "process_group",
)  # fmt: skip


class ShardedOptimizer(GroupedOptimizer, FollowingOptimizer, PicklableOptimizer, StatefulOptimizer):
    """An optimizer of whole and sharded parameters that takes the step of ``rules``, exactly under every layout.

    A subclass says ``rules``, and in its signature which options it has; the arithmetic is the rules'. The options of
    parameter groups are those that the rules declare, and lr, weight_decay and maximize. A group that names other rules
    (``{"params": ..., "rule": "adamw"}``) has their options, with their defaults, and lr, weight_decay and maximize of
    the optimizer.

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate, a number or a tensor of one (which a step never waits for).
        weight_decay, maximize: options of every group.
        seed: of the projections, where a rule has some; equal on all ranks.
        exclude: where the library chooses low-rank matrices, a regular expression of names to exclude.
        cache_projection: keep the current projections (True), redraw them from the seed every step (False), or "auto":
            keep them on CPU, redraw on accelerators. The results are identical.
        kernels, skip_nonfinite, max_skipped_steps, model, process_group: as of ``APOLLO``.
        options: those of the rules; keywords of other optimizers where they ask for what is done anyway; all others are
            errors.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules: Rules

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int = 0,
        exclude: str | None = None,
        cache_projection: bool | str = "auto",
        kernels: str = "auto",
        skip_nonfinite: bool = False,
        max_skipped_steps: int | None = 10,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        declared = {key: options.pop(key, option.default) for key, option in self.rules.options.items()}
        common = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        self.seed, self.exclude, self.cache_projection, self.kernels = seed, exclude, cache_projection, kernels
        self._choice, self._roles = KeptChoice(exclude), KeptRoles()
        self._process_group = process_group
        self._model = ModelRef(params if model is None and isinstance(params, nn.Module) else model)
        self._guard = NonFiniteGuard(plain(skip_nonfinite), plain(max_skipped_steps), process_group)
        self._members: dict[int, ParamInfo] = {}
        # Keeps the given parameters alive, so that their ids stay theirs.
        self._given: list[Tensor] = []
        self._frozen_once = set()
        self._accepted = frozenset()
        self._init_state()
        self._engine: zero.Engine | None = None
        self._driver = None
        self._constructed = False
        self._failures = Failures(process_group)
        run_together(lambda: self._construct(params, common | declared, options), process_group)
        check_same_on_all_ranks(self._facts, process_group, self._explain)
        self._constructed = True

    def _construct(self, params: Any, options: dict[str, Any], unknown: dict[str, Any]) -> None:
        """The local part of construction; may fail on one rank only."""
        drop_other_keywords(unknown, type(self).__name__)
        check_known(unknown, [*options_of(self.rules), *_ARGUMENTS], "argument")
        make_plain(options, self.rules)
        validate_options(options, type(self).__name__, self.rules)
        self._guard.check()
        self.seed, self.cache_projection = plain(self.seed), plain(self.cache_projection)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.cache_projection not in ("auto", True, False):
            raise ValueError(f'cache_projection must be "auto", True or False, got {self.cache_projection!r}')
        check_kernels(self.kernels)
        name_pattern(self.exclude)
        given_model = isinstance(params, nn.Module)
        self._model.check(params)
        self._from_model = given_model
        if not is_chosen(self.rules):
            if self.exclude is not None:
                kind = type(self).__name__
                raise ValueError(f"exclude={self.exclude!r} is for low-rank matrices, of which {kind} has none")
            self._choose = False
            super().__init__(named_parameters(params) if given_model else as_groups(params), options)
            return
        # A group that says rank=None is AdamW's, unless no group says anything else.
        if given_model:
            low = {key: value for key, value in options.items() if key != "rank"}
            found = chosen_groups(params, self.rules, options["rank"], self.exclude, low)
            groups = [{"rank": None, **group} for group in found]
        else:
            groups = [
                without_choice(group, options["rank"]) if group.get(RULE) is None else group
                for group in as_groups(params)
            ]
        mine = [group for group in groups if group.get(RULE) is None]
        self._choose = given_model or (bool(mine) and all(group.get("rank") is None for group in mine))
        if self._choose and not given_model and all("rank" in group for group in mine):
            for group in mine:
                del group["rank"]
        if self.exclude is not None and not self._choose:
            raise ValueError(
                f"exclude={self.exclude!r} has no effect on groups with a rank; put the parameters that it is to "
                "exclude into a group without rank"
            )
        super().__init__(groups, options)
        fsdp2.check_right(self._given)
        if self._choose and not given_model:
            if self._model.module is not None:
                self._decide({key: m.name for key, m in self._members.items()}, zero.Engine())
            else:
                # The engine, or a model that is attached, may know more at the first step.
                self._choice.check(self._to_choose({}), self.defaults["rank"])

    def prepare(self, engine: Any = None) -> list[StepPlan]:
        """Read the layouts and make the state now, not at the first step: a checkpoint is loaded into them.

        A collective, as the first step is. Where nothing changed since the last step it only looks that up.

        Args:
            engine: the DeepSpeed engine that drives this optimizer, if one does.

        Returns:
            One build for each call of ``step()`` that a step of training makes.

        Raises:
            ValueError: on all ranks alike, if a layout is not supported or ranks disagree.
        """
        if engine is not None:
            run_together(lambda: self.attach(engine), self._process_group)
        builds = []
        for call in zero_engine.step_calls(self._engine.wrapper if self._engine else None, self.param_groups):
            with zero_engine.as_in_step(self, call):
                built = self._current()
            assert built is not None
            builds.append(built)
        return builds

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters. Every rank of each shard group must call it.

        Where a rank holds a parameter whole and it has no gradient, it is skipped, as in torch's optimizers.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: at the first step, on all ranks alike, if a layout is not supported or ranks disagree.
            RankError: if the step failed on another rank, which raises its own error. A first step that fails before
                weights change can be repeated; after any other failure the job has to end.
            RuntimeError: after such a failure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        making_state = not self._builds and called_to_make_state()
        # ZeRO calls ``step()`` once for each group or sub-group, so some may have been stepped when a later one fails.
        partly = any(plan.steps is not None and plan.steps.taken for plan in self._builds.values())
        try:
            current = self._current()
            if current is not None and not making_state:
                if self._unreduced:
                    self._check_reduced(current)
                self._steps_of(current).take(self.seed, lambda: self._must_skip(current))
                self._stale = True
        except BaseException as error:
            if partly and self._find_engine().wrapper is not None:
                self._failures.half_way(error)
            raise
        return loss

    def _steps_of(self, current: StepPlan) -> Steps:
        if current.steps is None:
            current.steps = Steps(current.shard_groups, current.elementwise, self._failures)
        return current.steps

    def _must_skip(self, current: StepPlan) -> bool:
        return self._guard.enabled and self._guard.must_skip(current.gradients(), current.device)

    @property
    def skipped_steps(self) -> int:
        """Steps left out by ``skip_nonfinite`` since this optimizer was built."""
        return self._guard.skipped

    def _current(self) -> StepPlan | None:
        """What this step works on, built anew when the parameters or their structure changed.

        None in the step with zero gradients that DeepSpeed makes while it builds FP16_UnfusedOptimizer.
        """
        self._option_changes.check(self.param_groups, self._has_state)
        if self._builds:
            self._look_at_model()
        key = self._key()
        if key in self._builds:
            return self._builds[key]
        engine = self._find_engine()
        if engine.warming_up:
            return None
        # States that are made while this fails, on this rank or on another one, may be incomplete.
        slots = dict(self._slots)
        try:
            built = self._agreed_build(engine)
        except BaseException:
            # Builds of before may no longer share the tensors of these slots.
            self._slots, self._builds = slots, {}
            raise
        self._show()
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.info("%s: %s", type(self).__name__, built.summary())
        return built

    def _agreed_build(self, engine: zero.Engine) -> StepPlan:
        """A new build that all ranks agree on, with the state that was loaded; a collective."""
        run_together(lambda: self._follow_model(engine), self._process_group)
        detect.make_groups((p for group in self.param_groups for p in group["params"]), self._process_group)
        built = run_together(lambda: self._build(engine), self._process_group)
        check_same_on_all_ranks(built.facts, self._process_group, self._explain)
        # A build of the same parameters under other tensors is out of date.
        names = built.names()
        self._begin(shard.name for shard, _ in built.shards)
        self._generation += 1
        others = {k: b for k, b in self._builds.items() if names.isdisjoint(b.names())}
        with together(self._process_group):
            self._adopt(built, by_parameter=engine.wrapper is None and engine.driver is None)
        self._builds = {**others, self._key(): built}
        run_together(lambda: self._note_model(engine, built), self._process_group)
        return built

    def _facts(self) -> dict[str, object]:
        """What ranks must have in common when the optimizer is built."""
        facts: dict[str, object] = {
            "skip_nonfinite": self._guard.enabled,
            "max_skipped_steps": self._guard.limit,
            "kernels": self.kernels,
        }
        return facts | fingerprint(self.seed, self.param_groups, self._members_of_groups(), self.rules)

    def _key(self) -> tuple[Any, ...]:
        # With the groups' own ids, since a build reads their hyperparameters. Under ZeRO-3 each sub-group has a build,
        # and at each call one group holds its flat tensor and the others are empty.
        # Options without a value are refused when the changes of options are looked at.
        return tuple(
            (
                id(g),
                tuple(map(id, g["params"])),
                g.get(RULE),
                *(g.get(key) for key in rules_of(g, self.rules).spec_options),
            )
            for g in self.param_groups
        )

    def _follow_model(self, engine: zero.Engine) -> None:
        """Take the parameters that the model has now; local, may fail on one rank only."""
        if engine.wrapper is None and self._model.module is not None:
            self._follow()
        elif engine.wrapper is None:
            check_not_replaced(self._given)

    def _build(self, engine: zero.Engine) -> StepPlan:
        """The local part of ``_current``; may fail on one rank only."""
        if self._guard.enabled:
            zero_engine.check_skips(engine.wrapper)
        if engine.module is None:
            engine = replace(engine, module=self._model.module)
        return plan_step(
            self.param_groups,
            self._members,
            engine,
            self._slot_source(),
            self.rules,
            self._decide,
            self._roles.of,
            seed=self.seed,
            cache_projection=self.cache_projection,
            kernels=self.kernels,
            trained=self._trained,
            generation=self._generation,
        )
