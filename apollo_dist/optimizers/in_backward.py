"""Updates inside backward: each layer is updated as soon as its gradients are ready, and they are freed at once.

The gradients of a whole model then never exist together, only one layer's. The step itself is the ordinary one
(``step/run.py``), taken over a *part* of the parameters at a time: one parameter in a single process, and under FSDP2
what one ``fully_shard`` holds, whose gradients become ready together, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import run_together, world_of
from ..sharding import dtensor, fsdp2
from ..sharding.deepspeed import zero_engine
from ..state.callers import called_to_make_state
from ..step.failing import Steps
from .base import ShardedOptimizer
from .in_backward_checks import GradientHook, check_model, check_parameter, no_fp16
from .model_changes import any_trains
from .model_ref import ModelRef

if TYPE_CHECKING:
    from ..step.elementwise import ElementwiseTensor
    from ..step.plan import StepPlan
    from ..step.shard_group import ShardGroupStep


@dataclass(eq=False)
class _Part:
    """Parameters that are updated together, and what of the build is theirs."""

    tensors: list[Tensor] = field(default_factory=list)
    shard_groups: list[ShardGroupStep] = field(default_factory=list)
    elementwise: list[ElementwiseTensor] = field(default_factory=list)
    steps: Steps | None = None


class UpdatesInBackward(ShardedOptimizer):
    """What ``attach`` returns, together with an optimizer: ``backward()`` updates, ``step()`` ends the step."""

    updates_in_backward = True
    # Lets GradScaler call ``step()``, which then refuses it, where it would otherwise find no gradients to look at.
    _step_supports_amp_scaling = True

    def __init__(self, model: nn.Module, params: Any = None, **options: Any) -> None:
        group = options.get("process_group")
        self._module, self._hooked, self._unhooked = model, list[Tensor](), list[Tensor]()
        self._handles: list[Any] = []
        self._fired: set[int] = set()
        self._waiting: _Part | None = None
        self._divided: StepPlan | None = None
        self._parts: dict[int, _Part] = {}
        run_together(lambda: check_model(model, options), group)
        super().__init__(model if params is None else params, model=model, **options)
        # Hooks are on the parameters of now: no others may take their place, least of all the unsharded copies that
        # FSDP2 shows in the middle of a backward pass.
        self._model = ModelRef(None)
        self._hook_up()

    def _hook_up(self) -> None:
        """Add the hooks, on all ranks or on none; a collective."""
        try:
            run_together(lambda: self._add_hooks(world_of(self._process_group)), self._process_group)
        except Exception:
            self.detach()
            raise

    def _add_hooks(self, world: int) -> None:
        """The local part of attaching; may fail on one rank only."""
        held = [p for group in self.param_groups for p in group["params"]]
        numbers = {id(p): i for i, together in enumerate(fsdp2.reduced_together(self._module)) for p in together}
        present = {id(p) for p in self._module.parameters()}
        for p in held:
            if id(p) not in present:
                raise ValueError(
                    f"{self._members[id(p)].name} is not a parameter of the model; attach to the whole model"
                )
        # What FSDP2 does not reduce together with others is a part of its own.
        own = {id(p): i for i, p in enumerate(held, start=1 + max(numbers.values(), default=-1))}
        self._members = {key: replace(m, part=numbers.get(key, own[key])) for key, m in self._members.items()}
        self._world, self._sharded = world, numbers.keys()
        self._unhooked = held
        self._hook()
        self._handles.append(self._module.register_forward_pre_hook(self._before_forward))

    def _hook(self) -> None:
        """Hook the parameters that require a gradient; a frozen one can have a hook only once it does."""
        hook = GradientHook(self._ready)
        frozen = []
        for p in self._unhooked:
            if not p.requires_grad:
                frozen.append(p)
                continue
            check_parameter(self._members[id(p)].name, p, id(p) in self._sharded, self._world)
            self._handles.append(p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            self._hooked.append(p)
        self._unhooked, self._divided = frozen, None

    def detach(self) -> None:
        """Remove the hooks: ``backward()`` updates nothing any more, and this optimizer is done with."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_forward(self, *_: Any) -> None:
        """Refuse a forward pass whose gradients would not be those of a step, before it is made."""
        if not torch.is_grad_enabled():
            return
        if any_trains(self._unhooked):
            self._hook()
        if not fsdp2.reduces_gradients(self._module):
            raise ValueError(
                "set_requires_gradient_sync(False) keeps the gradients of the whole model, and updates inside backward "
                "are there to keep one layer's. Accumulate with APOLLO(model), or take larger micro-batches"
            )
        kind = next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise ValueError(no_fp16("the forward pass runs under autocast to float16"))

    @torch.no_grad()
    def _ready(self, tensor: Tensor) -> None:
        """A gradient is ready. Called in the same order on every rank."""
        if id(tensor) in self._fired:
            raise ValueError(
                f"{self._members[id(tensor)].name} got a second gradient before step(): its first one has been used "
                "already, so the two cannot be added up. Call step() after every backward(), without gradient "
                "accumulation (that needs APOLLO(model)); a layer that is called twice in a forward pass cannot be "
                "under FSDP2 or in reentrant activation checkpointing"
            )
        self._fired.add(id(tensor))
        part = self._part(tensor)
        if self._waiting is not None and self._waiting is not part:  # some parameter of it is not used in this step
            self._update(self._waiting)
        self._waiting = part
        if all(id(p) in self._fired for p in part.tensors):
            self._update(part)

    def _part(self, tensor: Tensor) -> _Part:
        # The first gradient of a step looks whether layouts have changed; a new build is a collective.
        if len(self._fired) == 1 or self._divided is None:
            built = self._current()
            assert built is not None
            if built is not self._divided:
                self._divided, self._parts = built, self._divide(built)
        return self._parts[id(tensor)]

    def _divide(self, built: StepPlan) -> dict[int, _Part]:
        """The parts of a build, by the ids of their parameters."""
        numbers = {m.name: m.part for m in self._members.values()}
        parts: dict[int, _Part] = {number: _Part() for number in numbers.values()}
        for group_step in built.shard_groups:
            parts[numbers[group_step.matrices[0].shard.name]].shard_groups.append(group_step)
        for tensor in built.elementwise:
            parts[numbers[tensor.shard.name]].elementwise.append(tensor)
        found = {}
        for p in self._hooked:
            part = parts[self._members[id(p)].part]
            part.tensors.append(p)
            found[id(p)] = part
        return found

    def _update(self, part: _Part) -> None:
        if part.steps is None:
            part.steps = Steps(part.shard_groups, part.elementwise, self._failures)
        part.steps.take(self.seed)
        for p in part.tensors:
            p.grad = None
        self._waiting = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the step that ``backward()`` made. Parameters that got no gradient in it are left alone, as ever.

        Args:
            closure: evaluates the model, calls ``backward()`` and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: if ``backward()`` updated nothing, or left gradients: they came past the hooks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._handles:
            raise ValueError("this optimizer was detached: attach a new one")
        if not self._builds and called_to_make_state():
            self.prepare()
            return loss
        if hasattr(self, "found_inf"):
            raise ValueError(no_fp16("GradScaler scales the loss"))
        if self._waiting is not None:
            self._update(self._waiting)
        self._check_finished()
        self._fired.clear()
        self._stale = True
        return loss

    def _check_finished(self) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        left = [self._members[id(p)].name for p in held if p.grad is not None]
        replaced = self._replaced()
        if self._fired and not left and not replaced:
            return
        if replaced:
            reason = f"{replaced} is another parameter than when it was attached; attach after it is sharded or moved"
        elif left:
            reason = (
                f"{left[0]} and {len(left) - 1} others have gradients that came past the hooks: set by hand, or "
                "requires_grad was switched on after the forward pass"
            )
        else:
            reason = (
                "no gradient became ready since the last step(). Call backward() before; under FSDP2 not after "
                "set_requires_gradient_sync(False)"
            )
        raise ValueError(f"step() ends the step that backward() made, which was not whole: {reason}")

    def _replaced(self) -> str | None:
        """The name of a parameter that is no longer in the model, for which nothing is updated any more."""
        for _ in range(2):
            present = {id(p) for p in self._module.parameters()}
            gone = [p for p in self._hooked if id(p) not in present]
            if not gone:
                return None
            dtensor.reshard(self._module)  # unsharded copies may stand in their places
        return self._members[id(gone[0])].name

    def attach(self, engine: Any) -> None:
        """Only a question: whether a model still has the parameters that the hooks are on.

        Raises:
            ValueError: if it has not, or for a DeepSpeed engine.
        """
        if zero_engine.is_engine(engine):
            raise ValueError(zero_engine.NOT_IN_BACKWARD)
        self._attach_model(engine, strict=True)

    def _attach_model(self, model: nn.Module, strict: bool) -> None:
        present = {id(p) for p in model.parameters()}
        if any(id(p) not in present for p in self._hooked):
            self._release_parameters()

    def _release_parameters(self) -> None:
        raise ValueError(
            "the model's parameters are replaced by others, and updates inside backward stay with those that they were "
            "attached to: call layerwise.attach once the model is wrapped (with Accelerate on what prepare() returned)"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Part of construction; afterwards an error, for the parameters would have no hooks.

        Raises:
            ValueError: after construction.
        """
        if self._handles:
            raise ValueError(
                "parameters cannot be added to an optimizer that updates inside backward: detach() it, and attach one "
                "to all of them"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise ValueError(
            "an optimizer that updates inside backward cannot be copied or pickled, since hooks of the model's "
            "parameters belong to it: use state_dict(), or apollo_dist.checkpoint"
        )
