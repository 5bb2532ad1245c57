"""Making DeepSpeed and the tools on top of it take APOLLO by name, and take it for what it is.

DeepSpeed looks unknown optimizer types up in ``torch.optim``, and under ZeRO accepts only the classes on its own list
unless ``zero_allow_untested_optimizer`` is set. ``register`` puts our classes in both places, as DeepSpeed does for its
own Muon. (That is what the name "Muon" means there; ours is "ApolloDistMuon".)

Two tools put another optimizer in the place of one that they were given, without a word; here that is an error:

- with optimizer offload Accelerate makes a ``DeepSpeedCPUAdam`` of whatever it gets, unless
  ``zero_force_ds_cpu_optimizer`` is false;
- under DeepSpeed the Hugging Face ``Trainer`` drops ``optimizers=`` and builds its default, AdamW.

Neither leaves a trace of the optimizer that was meant, so the function that replaces it is where we must be. In the
same way ``deepspeed.initialize`` refuses what could not be exact, before it makes anything. All of this waits for the
modules to be imported by whoever needs them: nothing of them is imported here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from ..distributed import rank_of
from ..sharding.deepspeed.faults import installed, older_than
from ..sharding.deepspeed.zero_engine import NOT_IN_BACKWARD, check_supported
from ..weights.int8 import holds_int8
from .import_hooks import after_import, wrap_function

logger = logging.getLogger("apollo_dist")

Classes = Mapping[str, type[torch.optim.Optimizer]]  # by their names in DeepSpeed's JSON


def register(classes: Classes) -> None:
    """Make ``"optimizer": {"type": "APOLLO"}`` work in a DeepSpeed config, and instances pass as tested.

    Called once, when ``apollo_dist`` is imported: before DeepSpeed, Accelerate and transformers, or after them.

    Args:
        classes: the optimizers, by the names that a DeepSpeed config may say. One that torch itself has by now keeps
            torch's meaning, and the log says so.
    """
    name_in_torch(classes)
    after_import("deepspeed.runtime.zero.utils", lambda m: _support(m, classes))
    after_import("deepspeed.runtime.engine", lambda m: _guard_engine(m.DeepSpeedEngine, classes))
    after_import("deepspeed.runtime.zero.partition_parameters", _wait_for_every_gather)
    after_import("accelerate.accelerator", lambda m: _guard(m, "map_pytorch_optim_to_deepspeed", _no_swap(classes)))
    after_import("transformers.trainer", lambda m: _guard(m, "deepspeed_init", _no_drop(classes)))


def name_in_torch(classes: Classes) -> None:
    """Put classes into ``torch.optim``, where DeepSpeed looks for a name, and tell of names that torch has itself."""
    for name, cls in classes.items():
        known = getattr(torch.optim, name, cls)
        if known.__module__ == cls.__module__:  # also where this package is imported once more
            setattr(torch.optim, name, cls)
        else:
            logger.warning(
                'torch has an optimizer %s of its own, which "type": "%s" in a DeepSpeed config means: to have ours, '
                "build it and pass it to deepspeed.initialize",
                name,
                name,
            )


def _support(module: ModuleType, classes: Classes) -> None:
    """Add the classes to DeepSpeed's list of optimizers that are tested under ZeRO."""
    supported = getattr(module, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None:
        supported.extend(cls for cls in classes.values() if cls not in supported)


def _wait_for_every_gather(module: ModuleType) -> None:
    """Mend ZeRO-3's gather of several parameters at once, where gloo takes part.

    DeepSpeed waits for the last of several all-gathers only (fixed between 0.19.4 and 0.19.8). On an accelerator these
    are done in order; gloo's threads do them in any order, and a parameter may then hold what was in memory before:
    seen once in some 200 gathers of 21 parameters. Gathered one at a time each is waited for.
    """
    name = "_allgather_params_coalesced"
    if not older_than("0.19.8") or not hasattr(module.Init, name):
        return
    told = False

    def call(function: Callable[..., Any], init: Any, param_list: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal told
        if len(param_list) < 2 or init.local_device.type != "cpu":
            return function(init, param_list, *args, **kwargs)
        if not told and rank_of() == 0:
            logger.info("ZeRO-3 on CPUs: parameters are gathered one at a time, for DeepSpeed %s waits for the last "
                        "of several gathers only", installed())  # fmt: skip
        told = True
        for parameter in param_list:
            function(init, [parameter], *args, **kwargs)
        return None

    wrap_function(module.Init, name, call)


def _name_of(optimizer: Any, classes: Classes) -> str | None:
    """The name in the JSON of the class that an object is of, or that its class is derived from; None without one."""
    names = {cls: name for name, cls in classes.items()}
    return next((names[cls] for cls in type(optimizer).__mro__ if cls in names), None)


def _guard(owner: ModuleType | type, name: str, check: Callable[..., None]) -> None:
    """Let ``check`` see, and refuse, the arguments of a function of a module or class."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    wrap_function(owner, name, call)


def _guard_engine(engine: type, classes: Classes) -> None:
    _guard(engine, "_configure_distributed_model", _no_int8(classes))
    _guard(engine, "_do_optimizer_sanity_check", _no_inexact(classes))


def _no_int8(classes: Classes) -> Callable[..., None]:
    """The check of DeepSpeed's ``engine._configure_distributed_model(model)``, which moves the model and broadcasts it.

    It would fail there with INT8 weights, and the error would not say why.
    """

    def check(engine: Any, model: Any = None, *_: Any, **__: Any) -> None:
        client = getattr(engine, "client_optimizer", None)
        named = getattr(getattr(engine, "_config", None), "optimizer_name", None) in classes
        if not named and not isinstance(client, tuple(classes.values())):
            return
        found = [name for name, parameter in model.named_parameters() if holds_int8(parameter)]
        if found:
            raise ValueError(
                f"{found[0]} and {len(found) - 1} others are INT8, and DeepSpeed keeps fp32 masters of what it trains, "
                "so INT8 would save nothing: use one process, DDP(init_sync=False) or FSDP2, or leave the model in bf16"
            )

    return check


def _no_inexact(classes: Classes) -> Callable[..., None]:
    """The check of DeepSpeed's ``engine._do_optimizer_sanity_check(basic_optimizer)``, before any wrapper is made.

    Here alone engine and optimizer are both at hand, whoever built the optimizer, so this is where the optimizer is
    told its engine.
    """

    def check(engine: Any, basic_optimizer: Any = None, *_: Any, **__: Any) -> None:
        if _name_of(basic_optimizer, classes) is not None:
            if getattr(basic_optimizer, "updates_in_backward", False):
                raise ValueError(NOT_IN_BACKWARD)
            check_supported(engine)
            driven_by = getattr(basic_optimizer, "driven_by", None)
            if driven_by is not None:
                driven_by(engine)

    return check


def _no_swap(classes: Classes) -> Callable[..., None]:
    """The check of Accelerate's ``map_pytorch_optim_to_deepspeed(optimizer)``."""

    def check(optimizer: Any, *_: Any, **__: Any) -> None:
        name = _name_of(optimizer, classes)
        if name is not None:
            raise ValueError(
                f"Accelerate is about to replace {type(optimizer).__name__} by DeepSpeedCPUAdam, because the DeepSpeed "
                'config offloads the optimizer. Add "zero_force_ds_cpu_optimizer": false to the config (top level), or '
                f'name the optimizer there ("optimizer": {{"type": "{name}", ...}}) and pass '
                "accelerate.utils.DummyOptim"
            )

    return check


def _no_drop(classes: Classes) -> Callable[..., None]:
    """The check of transformers' ``deepspeed_init(trainer, num_training_steps, inference=False)``."""

    def check(trainer: Any, num_training_steps: Any = None, inference: bool = False) -> None:
        given = getattr(trainer, "optimizer", None)
        name = _name_of(given, classes)
        if name is not None and not inference:
            raise ValueError(
                f"under DeepSpeed the Trainer drops optimizers=({type(given).__name__}, ...) and would train with its "
                f"own default. Pass Trainer(optimizer_cls_and_kwargs=({type(given).__name__}, {{...}})), or name the "
                f'optimizer in the DeepSpeed config: "optimizer": {{"type": "{name}", ...}}'
            )

    return check
