"""Names for optimizers that the Hugging Face ``Trainer`` and Accelerate handle.

Both know the model and do not say: the ``Trainer`` builds the optimizer from bare parameters in groups of its own (with
and without weight decay), and under FSDP2 ``Accelerator.prepare`` shards the model and puts the new parameters into the
optimizer's groups. Here the optimizer is told the model at these two places, so that it chooses the matrices and draws
the projections of ``APOLLO(model)``. Nothing is imported: this waits for the modules to be imported by whoever needs
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..sharding import fsdp1
from ..sharding.deepspeed import zero_engine
from .import_hooks import after_import, wrap_function
from .trainer_optim import creating
from .trainer_optim import register as register_names

Classes = tuple[type[Any], ...]


def register(*classes: type[Any]) -> None:
    """Tell optimizers of these classes the model; called once, when ``apollo_dist`` is imported."""
    after_import("transformers.trainer", lambda m: wrap_function(m.Trainer, "create_optimizer", _create(classes)))
    register_names()
    after_import("accelerate.accelerator", lambda m: wrap_function(m.Accelerator, "prepare", _prepare(classes)))


def _create(classes: Classes) -> Callable[..., Any]:
    """Around ``Trainer.create_optimizer(model=None)``."""

    def call(create: Callable[..., Any], trainer: Any, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        trained = trainer.model if model is None else model
        # FSDP1's parameters have neither a shape nor a place without their model.
        fsdp1.register(trained)
        token = creating.set(trainer)
        try:
            result = create(trainer, *(() if model is None else (model,)), *args, **kwargs)
        finally:
            creating.reset(token)
        if isinstance(trainer.optimizer, classes):
            trainer.optimizer.attach(trained)
        return result

    return call


def _prepare(classes: Classes) -> Callable[..., Any]:
    """Around ``Accelerator.prepare(*objects)``."""

    def call(prepare: Callable[..., Any], accelerator: Any, *objects: Any, **kwargs: Any) -> Any:
        ours: list[Any] = [item for item in objects if isinstance(item, classes)]
        models = [item for item in objects if isinstance(item, nn.Module)]
        if not ours or len(models) != 1:
            return prepare(accelerator, *objects, **kwargs)
        replaced = bool(getattr(accelerator, "is_fsdp2", False))
        if replaced:
            for optimizer in ours:
                optimizer._release_parameters()
        result = prepare(accelerator, *objects, **kwargs)
        model = next(item for item in result if isinstance(item, nn.Module))
        if not zero_engine.is_engine(model):
            for optimizer in ours:
                optimizer._attach_model(model, strict=replaced)
        return result

    return call
