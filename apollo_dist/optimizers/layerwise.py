"""Optimizers that update inside backward: what ``apollo_dist.layerwise.attach`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..distributed import run_together
from ..sharding.deepspeed import zero_engine
from .base import ShardedOptimizer
from .in_backward import InBackward
from .in_backward_checks import check_model
from .model_ref import ModelRef


class UpdatesInBackward(ShardedOptimizer):
    """An optimizer that ``InBackward`` drives: ``backward()`` updates, ``step()`` ends the step.

    It is an optimizer to schedulers, checkpoints and tools. Classes are made of it and of an optimizer.
    """

    updates_in_backward = True
    # Lets GradScaler call ``step()``, which then refuses it, where it would otherwise find no gradients to look at.
    _step_supports_amp_scaling = True
    _driver: InBackward | None = None

    def __init__(self, model: nn.Module, params: Any = None, **options: Any) -> None:
        run_together(lambda: check_model(model, options), options.get("process_group"))
        super().__init__(model if params is None else params, model=model, **options)
        self._parts.following.model = ModelRef(None)  # it does not follow a model, for hooks do not
        self._drive(model)

    def _drive(self, model: nn.Module) -> None:
        """Hook up the parameters; a collective."""
        self._driver = InBackward(self, model)
        self._driver.hook_up()

    def detach(self) -> None:
        """Remove the hooks: ``backward()`` updates nothing any more, and this optimizer is done with."""
        if self._driver is not None:
            self._driver.detach()

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
        if self._driver is None:
            raise ValueError("step() came before the model was sharded, for which the hooks of this optimizer wait")
        self._driver.end_step()
        return loss

    def attach(self, engine: Any) -> None:
        """Only a question: whether a model still has the parameters that the hooks are on.

        Raises:
            ValueError: if it has not, or for a DeepSpeed engine.
        """
        if zero_engine.is_engine(engine):
            raise ValueError(zero_engine.NOT_IN_BACKWARD)
        self._attach_model(engine, strict=True)

    def _attach_model(self, model: nn.Module, strict: bool) -> None:
        if self._driver is not None and not self._driver.is_on(model):
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
        if self._driver is not None and self._driver.hooked:
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
