"""A ``torch.optim.Optimizer`` for whole and sharded parameters, made of the objects in ``parts.py``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import check_same_on_all_ranks, run_together
from ..selection.kept import KeptChoice
from ..selection.roles import KeptRoles
from ..sharding.deepspeed import zero, zero_engine
from ..state.callers import called_to_make_state
from ..step.failing import Steps
from ..step.failures import Failures
from ..step.fingerprint import explain
from ..step.nonfinite import NonFiniteGuard
from ..step.plan import plan_step
from .construction import add_group, after_groups, checked_groups
from .following import Following
from .grouped import Before
from .members import Members
from .option_changes import OptionChanges
from .options import plain
from .param_groups import chosen_groups
from .parts import Parts
from .picklable import pickled, restored
from .plans import Plans, Settings
from .state_dicts import load_state_dict, state_dict
from .state_store import StateStore, named

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..step.plan import StepPlan


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of whole and sharded parameters that takes the step of ``rules``, exactly under every layout.

    A subclass says ``rules``, and in its signature which options it has; the arithmetic is the rules'. The options of
    parameter groups are those that the rules declare, and lr, weight_decay, maximize and stochastic_rounding. A group
    that names other rules (``{"params": ..., "rule": "adamw"}``) has their options, with their defaults, and those four
    of the optimizer.

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate, a number or a tensor of one (which a step never waits for).
        weight_decay, maximize, stochastic_rounding: options of every group.
        seed: of the projections, where a rule has some; equal on all ranks.
        exclude, embeddings: where the library chooses low-rank matrices, as of ``APOLLO``.
        cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group: as of ``APOLLO``.
        options: those of the rules; other optimizers' where they ask for what is done anyway; all else is an error.

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
        stochastic_rounding: bool = False,
        seed: int = 0,
        exclude: str | None = None,
        embeddings: str = "adamw",
        cache_projection: bool | str = "auto",
        kernels: str = "auto",
        skip_nonfinite: bool = False,
        max_skipped_steps: int | None = 10,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        own = {key: options.pop(key, option.default) for key, option in self.rules.options.items()}
        own |= {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        own["stochastic_rounding"] = stochastic_rounding
        self.seed, self.exclude, self.kernels = plain(seed), exclude, kernels
        self.cache_projection = plain(cache_projection)
        model = params if model is None and isinstance(params, nn.Module) else model
        guard = NonFiniteGuard(plain(skip_nonfinite), plain(max_skipped_steps), process_group)
        self._make_parts(KeptChoice(exclude, embeddings), model, guard, process_group)
        self._constructed = False
        run_together(lambda: self._construct(params, own, options), process_group)
        check_same_on_all_ranks(self._facts, process_group, explain(process_group))
        self._constructed = True

    def _make_parts(
        self, choice: KeptChoice, model: nn.Module | None, guard: NonFiniteGuard, group: dist.ProcessGroup | None
    ) -> None:
        """Make what this optimizer consists of, without parameters yet."""
        rules, title = self.rules, type(self).__name__
        members = Members(rules, title, choice, KeptRoles())
        following, store = Following(model, members, group), StateStore(rules, members, group)
        failures, changes = Failures(group), OptionChanges(rules)
        steps = partial(Steps, failures=failures)
        plans = Plans(rules, members, following, store, guard, group, plan_step, steps)
        self._parts = Parts(rules, title, group, members, following, store, plans, changes, guard, failures)

    def _construct(self, params: Any, options: dict[str, Any], unknown: dict[str, Any]) -> None:
        """The local part of construction; may fail on one rank only."""
        given = params, options, unknown
        super().__init__(checked_groups(self._parts, self._settings, *given, chosen_groups), options)
        after_groups(self._parts, self.param_groups)

    @property
    def _settings(self) -> Settings:
        return Settings(self.seed, self.cache_projection, self.kernels)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; with ``rank`` it is low-rank, without it is AdamW. Every rank must call it.

        If the optimizer was built from a model, or from groups without any rank, the matrices of a group that does not
        say ``rank`` are chosen here as well, by the same rule. What was chosen before stays as it is. Frozen parameters
        that ``APOLLO(model)`` holds, and that have never trained, move to the group.

        Raises:
            ValueError: on all ranks alike, for unknown keys, bad values, parameters that are there already, or that
                cannot be low-rank in a group with ``rank``, for some parameters with names and others without, or if
                ranks differ. The optimizer is then as it was.
        """
        parts, later = self._parts, self._constructed
        add = partial(add_group, self, parts, self.seed, param_group, super().add_param_group, later=later)
        if not later:
            add()
            return
        before = Before.of(self.param_groups, parts.members)
        try:
            run_together(add, parts.group)
            check_same_on_all_ranks(self._facts, parts.group, explain(parts.group))
        except BaseException:
            before.restore(self.param_groups, parts.members)
            raise

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
            run_together(lambda: self.attach(engine), self._parts.group)
        builds, attached = [], self._parts.following.engine
        for call in zero_engine.step_calls(attached.wrapper if attached else None, self.param_groups):
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
        making_state = not self._parts.plans.built and called_to_make_state()
        # ZeRO calls ``step()`` once for each group or sub-group, so some may have been stepped when a later one fails.
        partly = any(plan.steps.taken for plan in self._parts.plans.built.values())
        try:
            current = self._current()
            if current is not None and not making_state:
                if self._parts.following.unreduced:
                    self._parts.following.check_reduced(current)
                current.steps.take(self.seed, lambda: self._parts.guard.skips(current.gradients, current.device))
                self._parts.store.stale = True
        except BaseException as error:
            if partly and self._parts.following.find_engine(self).wrapper is not None:
                self._parts.failures.half_way(error)
            raise
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps left out by ``skip_nonfinite`` since this optimizer was built."""
        return self._parts.guard.skipped

    def _current(self) -> StepPlan | None:
        """What this step works on; None in the step that DeepSpeed makes while it builds FP16_UnfusedOptimizer."""
        self._parts.changes.check(self.param_groups, self._parts.store.has_state)
        return self._parts.plans.current(self, self.param_groups, self._settings)

    def _facts(self) -> dict[str, object]:
        """What ranks must have in common."""
        return {"kernels": self.kernels, **self._parts.facts(self.param_groups, self.seed)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero; also those of parameters that took others' places in the model.

        A parameter that replaces another (``model.to`` may do that) keeps a copy of its gradient, to which the next
        backward pass would add.
        """
        self._parts.plans.look(self.param_groups, self.seed)
        super().zero_grad(set_to_none)

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
            self._parts.following.engine = zero.from_engine(engine, self)

    def _attach_model(self, model: nn.Module, strict: bool) -> None:
        """``attach`` for a model; a collective."""
        run_together(lambda: self._parts.plans.attach(model, self.param_groups, self.seed, strict), self._parts.group)

    def _release_parameters(self) -> None:
        """Hold no parameters, only their names: they are about to be replaced, and ``attach`` follows."""
        self._parts.members.release()
        self._parts.plans.forget()

    def driven_by(self, engine: Any) -> None:
        """Note the DeepSpeed engine that is being built around this optimizer; ``deepspeed.initialize`` calls it."""
        taken = self._parts.following.driven_by(engine, self.param_groups)
        if len(taken) < len(self.param_groups):
            self.param_groups[:] = taken
            self._parts.changes.remember(taken)

    def named_state(self) -> dict[str, dict[str, Any]]:
        """The state that this rank holds, by matrix or parameter name; live, in the layout of this rank."""
        return named(self._parts.store.slots)

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds; 0 before the first step."""
        return self._parts.store.bytes()

    @property
    def state(self) -> defaultdict[Any, Any]:
        """What this rank has of each parameter's state, as ``state_dict`` gives it; live, to look at.

        Empty before the first step and under layouts other than plain and DTensor parameters. Of experts the values
        are lists by matrix. Keys that are no parameters are the caller's own, and travel in ``state_dict``.
        """
        return self._parts.store.shown

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        self._parts.store.shown = value

    def expect_state(self, names: Set[str]) -> None:
        """Make state for these parameters at the next ``prepare`` or step, also while they are frozen.

        A checkpoint that has state of theirs is about to be loaded. All ranks must name the same.
        """
        self._parts.plans.expect_state(names)

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter, and the parameter groups; projections are no part of it, they follow from the seed.

        Local, as of any torch optimizer: nothing is communicated, and one rank alone may call it. Tensors may be the
        live ones. With DTensor parameters (FSDP2, HSDP) it holds DTensors: ``torch.distributed.checkpoint`` can save
        it, and load it at another number of ranks (``get_optimizer_state_dict``, ``set_optimizer_state_dict``). Under
        DeepSpeed it is this rank's own, by name, and loads only on the same rank of the same number of ranks.
        Parameter groups carry the seed, the names of their parameters where those are known, and the version of the
        state's form (``apollo_dist.state.identity``).

        Raises:
            ValueError: under FSDP1, where neither this nor ``FSDP.optim_state_dict`` could hold all of it.
        """
        return state_dict(self, self._parts, self.seed)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave, exactly. Every rank must call it, with the same state.

        The state is judged here, before anything changes. It is copied, keeps its dtypes, and replaces whatever state
        there was: parameters of which it has nothing start anew, as in torch, and the log says which. Options of the
        parameter groups are those that were saved, as in torch; what differs from here, but for lr, is in the log.
        Keys of the state that are no parameters are kept as they are.

        Raises:
            ValueError: on all ranks alike, with what to do: if seed, names, rank or the choice of low-rank matrices
                are others, if the state is another optimizer's, if parameter groups differ in number or size or hold
                bad options, or if ranks load different states. ``accept_at_load`` accepts another seed, other names and
                the projections of older versions.
        """
        load_state_dict(self, self._parts, self.seed, state_dict)

    def accept_at_load(self, *what: str) -> None:
        """Let the next load take a state with another seed, with other names, or of an older version's projections.

        Its moments then go on under the projections that this optimizer generates, which is no exact continuation: it
        takes some steps until moments of the old projections are forgotten.

        Args:
            what: one or several of "seed", "names" and "projections". With other names the state goes to parameters by
                their position. ``apollo_dist.checkpoint.load`` goes by name, and heeds "seed" and "projections".

        Raises:
            ValueError: for anything else.
        """
        self._parts.store.accept_at_load(what)

    def take_accepted(self) -> frozenset[str]:
        """What ``accept_at_load`` let the load take that begins now; the next one is compared in full again."""
        return self._parts.store.take_accepted()

    def __getstate__(self) -> dict[str, Any]:
        return pickled(self.__dict__, self._parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._constructed = True
        self._make_parts(KeptChoice(state["exclude"]), None, state["_guard"], None)
        super().__setstate__(restored(state, self._parts))
        self.defaults.pop("differentiable", None)  # which torch adds
        self._parts.show(self.param_groups)
