"""Updates inside backward: each layer is updated as soon as its gradients are ready, and they are freed at once.

The gradients of a whole model then never exist together, only one layer's. The step itself is the ordinary one
(``step/run.py``), taken over a *part* of the parameters at a time: one parameter in a single process, and under FSDP2
what one ``fully_shard`` holds, whose gradients become ready together, in the same order on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import run_together, world_of
from ..sharding import dtensor, fsdp2
from ..state.callers import called_to_make_state
from ..step.failing import Steps
from .in_backward_checks import GradientHook, check_parameter, no_fp16
from .model_changes import any_trains
from .model_ref import ModelRef

if TYPE_CHECKING:
    from ..step.elementwise import ElementwiseTensor
    from ..step.plan import StepPlan
    from ..step.shard_group import ShardGroupStep
    from .base import ShardedOptimizer


@dataclass(eq=False)
class _Part:
    """Parameters that are updated together, and what of the build is theirs."""

    tensors: list[Tensor] = field(default_factory=list)
    shard_groups: list[ShardGroupStep] = field(default_factory=list)
    elementwise: list[ElementwiseTensor] = field(default_factory=list)
    steps: Steps | None = None


class InBackward:
    """Drives an optimizer from inside backward: hooks on its parameters update them.

    Args:
        optimizer: which is built, and has taken no step.
        model: whose parameters it has, all of them or some.

    Hooks are on the parameters of now: no others may take their place, least of all the unsharded copies that FSDP2
    shows in the middle of a backward pass. So the optimizer does not follow the model any more.
    """

    def __init__(self, optimizer: ShardedOptimizer, model: nn.Module) -> None:
        self._optimizer, self._members, self._model = optimizer, optimizer._parts.members, model
        self._hooked, self._unhooked = list[Tensor](), list[Tensor]()
        self._handles: list[Any] = []
        self._fired: set[int] = set()
        self._waiting: _Part | None = None
        self._divided: StepPlan | None = None
        self._parts: dict[int, _Part] = {}
        optimizer._parts.following.model = ModelRef(None)

    @property
    def hooked(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    def hook_up(self) -> None:
        """Add the hooks, on all ranks or on none; a collective."""
        group = self._optimizer._parts.group
        try:
            run_together(lambda: self._add_hooks(world_of(group)), group)
        except Exception:
            self.detach()
            raise

    def _add_hooks(self, world: int) -> None:
        """The local part of attaching; may fail on one rank only."""
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        numbers = {id(p): i for i, together in enumerate(fsdp2.reduced_together(self._model)) for p in together}
        present = {id(p) for p in self._model.parameters()}
        for p in held:
            if id(p) not in present:
                raise ValueError(f"{self._members.name(p)} is not a parameter of the model; attach to the whole model")
        # What FSDP2 does not reduce together with others is a part of its own.
        own = {id(p): i for i, p in enumerate(held, start=1 + max(numbers.values(), default=-1))}
        self._members.infos = {
            key: replace(m, part=numbers.get(key, own[key])) for key, m in self._members.infos.items()
        }
        self._world, self._sharded = world, numbers.keys()
        self._unhooked = held
        self._hook()
        self._handles.append(self._model.register_forward_pre_hook(self._before_forward))

    def _hook(self) -> None:
        """Hook the parameters that require a gradient; a frozen one can have a hook only once it does."""
        hook = GradientHook(self._ready)
        frozen = []
        for p in self._unhooked:
            if not p.requires_grad:
                frozen.append(p)
                continue
            check_parameter(self._members.name(p), p, id(p) in self._sharded, self._world)
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
        if not fsdp2.reduces_gradients(self._model):
            raise ValueError(
                "set_requires_gradient_sync(False) keeps the gradients of the whole model, and updates inside backward "
                "are there to keep one layer's. Accumulate with APOLLO(model), or take larger micro-batches"
            )
        kind = next((p.device.type for group in self._optimizer.param_groups for p in group["params"]), "cpu")
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise ValueError(no_fp16("the forward pass runs under autocast to float16"))

    @torch.no_grad()
    def _ready(self, tensor: Tensor) -> None:
        """A gradient is ready. Called in the same order on every rank."""
        if id(tensor) in self._fired:
            raise ValueError(
                f"{self._members.name(tensor)} got a second gradient before step(): its first one has been used "
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
            built = self._optimizer._current()
            assert built is not None
            if built is not self._divided:
                self._divided, self._parts = built, self._divide(built)
        return self._parts[id(tensor)]

    def _divide(self, built: StepPlan) -> dict[int, _Part]:
        """The parts of a build, by the ids of their parameters."""
        numbers = {m.name: m.part for m in self._members.infos.values()}
        parts: dict[int, _Part] = {number: _Part() for number in numbers.values()}
        for group_step in built.shard_groups:
            parts[numbers[group_step.matrices[0].shard.name]].shard_groups.append(group_step)
        for tensor in built.elementwise:
            parts[numbers[tensor.shard.name]].elementwise.append(tensor)
        found = {}
        for p in self._hooked:
            part = parts[self._members.infos[id(p)].part]
            part.tensors.append(p)
            found[id(p)] = part
        return found

    def _update(self, part: _Part) -> None:
        if part.steps is None:
            part.steps = Steps(part.shard_groups, part.elementwise, self._optimizer._parts.failures)
        part.steps.take(self._optimizer.seed)
        for p in part.tensors:
            p.grad = None
        self._waiting = None

    def end_step(self) -> None:
        """End the step that ``backward()`` made.

        Raises:
            ValueError: if ``backward()`` updated nothing, or left gradients: they came past the hooks.
        """
        optimizer = self._optimizer
        if not self._handles:
            raise ValueError("this optimizer was detached: attach a new one")
        if not optimizer._parts.plans.built and called_to_make_state():
            optimizer.prepare()
            return
        if hasattr(optimizer, "found_inf"):
            raise ValueError(no_fp16("GradScaler scales the loss"))
        if self._waiting is not None:
            self._update(self._waiting)
        self._check_finished()
        self._fired.clear()
        optimizer._parts.store.stale = True

    def _check_finished(self) -> None:
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        left = [self._members.name(p) for p in held if p.grad is not None]
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
            present = {id(p) for p in self._model.parameters()}
            gone = [p for p in self._hooked if id(p) not in present]
            if not gone:
                return None
            dtensor.reshard(self._model)  # unsharded copies may stand in their places
        return self._members.name(gone[0])

    def is_on(self, model: nn.Module) -> bool:
        """Whether a model still has the parameters that the hooks are on."""
        present = {id(p) for p in model.parameters()}
        return all(id(p) in present for p in self._hooked)
