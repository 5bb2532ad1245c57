"""DeepSpeed's engine and wrappers outside of ``step()``: what a checkpoint reads, and puts right after a load.

Like ``zero.py`` and ``zero3.py`` it reads DeepSpeed's attributes (verified on the versions of docs/versions.md).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..internals import UnknownInternals, first_of, require, version_of
from ..local_shard import LocalShard, ShardGroup
from ..regions import FlatPartition, even_ranges, whole_partition
from . import zero
from .unsupported import unsupported
from .zero3 import is_stage3

# What of a dynamic loss scaler changes during training.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Group = dict[str, Any]

NOT_IN_BACKWARD = (
    "DeepSpeed collects, reduces and clips gradients itself, and calls step() with what became of them; updates inside "
    "backward would come before that. Use APOLLO; ZeRO-2 and 3 free gradients early as well"
)


def is_engine(model: object) -> bool:
    """Whether ``model`` is what ``deepspeed.initialize`` returned first."""
    runtime = sys.modules.get("deepspeed.runtime.engine")
    return runtime is not None and isinstance(model, runtime.DeepSpeedEngine)


def check_supported(engine: Any) -> None:
    """Raise ValueError if no optimizer like ours can be exact under a DeepSpeed engine, with reasons and remedies."""
    findings = [*unsupported(zero.config(engine)), *zero.unsupported(engine)]
    if findings:
        raise ValueError("APOLLO cannot train exactly under this DeepSpeed engine:\n" + "\n".join(findings))


def client_optimizer(engine: Any) -> Any:
    """The optimizer inside the engine's wrapper, or the engine's own where there is no wrapper."""
    return first_of(engine, "basic_optimizer")


def step_calls(wrapper: Any, groups: Sequence[Group]) -> list[list[tuple[Group, list[Tensor]]]]:
    """The groups and their ``params`` as ``step()`` will see them, one list for each call in one engine step.

    Args:
        wrapper: DeepSpeed's optimizer wrapper, or None.
        groups: the optimizer's ``param_groups`` between steps.

    Raises:
        ValueError: if the weights are not in memory between steps; the same on every rank.
    """
    if getattr(wrapper, "swap_optimizer", False):
        raise ValueError(
            "with NVMe offload the fp32 weights are on the disk between steps, where apollo_dist.checkpoint does not "
            'reach them; set offload_optimizer.device to "cpu"'
        )
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return [[(group, group["params"])] for group in groups]
    if is_stage3(wrapper):
        return [
            [(group, [flat] if i == wrapper.sub_group_to_group_id[k] else []) for i, group in enumerate(groups)]
            for k, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
        ]
    return [[(group, group["params"]) for group in groups]]


def check_skips(wrapper: Any) -> None:
    """Raise ValueError where ``skip_nonfinite`` could leave out a part of a step only.

    ZeRO calls ``step()`` once for each parameter group or, at stage 3, sub-group. When a later one's gradients turn out
    not to be finite, weights of earlier ones have changed, unless DeepSpeed has looked at all gradients before. It does
    so in fp16; at stages 1 and 2 since 0.17.1 where ``check_grad_overflow`` is on; in fp32 and at stage 3 in the
    versions whose norm tells gradients that are not finite.
    """
    if is_stage3(wrapper):
        calls = len(wrapper.fp32_partitioned_groups_flat)
        checked = wrapper.dtype is torch.float16
    else:
        calls = len(getattr(wrapper, "single_partition_of_fp32_groups", ()))
        checked = getattr(wrapper, "check_grad_overflow", getattr(wrapper, "dtype", None) is torch.float16)
    if checked or calls < 2:
        return
    bf16 = wrapper.dtype is torch.bfloat16 and not is_stage3(wrapper)
    by_norm = hasattr(sys.modules[type(wrapper).__module__], "is_invalid_grad_norm")
    if by_norm and not bf16 and getattr(wrapper, "compute_grad_norm", True):
        return
    remedy = 'write "check_grad_overflow": true into the "bf16" section' if bf16 else "use stage 0"
    raise ValueError(
        f"skip_nonfinite: DeepSpeed {version_of('deepspeed')} does not look for gradients that are not finite here, "
        f"and calls step() for each of {calls} parameter groups or sub-groups: a part of a step could be taken; "
        f"{remedy}, or install another version"
    )


@contextmanager
def as_in_step(optimizer: Any, call: Sequence[tuple[Group, list[Tensor]]]) -> Iterator[None]:
    """Give ``optimizer`` the ``param_groups`` of one of ``step_calls``, and its own back in the end."""
    groups, kept = optimizer.param_groups, [group["params"] for group, _ in call]
    try:
        optimizer.param_groups = [group for group, _ in call]
        for group, params in call:
            group["params"] = params
        yield
    finally:
        for (group, _), params in zip(call, kept, strict=True):
            group["params"] = params
        optimizer.param_groups = groups


@torch.no_grad()
def update_model(wrapper: Any) -> None:
    """Give the model the values of the fp32 weights that the wrapper holds, which a load has changed.

    Under ZeRO a collective over each shard group.
    """
    if hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif is_stage3(wrapper):
        # As after a step. Parameters that are kept gathered, because they are small, are out of date: they are dropped
        # first and gathered anew in the end, as hpZ's second copies are.
        require(wrapper, "checkpoint_event_prologue", "checkpoint_event_epilogue")
        require(wrapper, "_reassign_or_swap_out_partitioned_parameters")
        wrapper.checkpoint_event_prologue()
        for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        wrapper.checkpoint_event_epilogue()
    elif hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):
        for parameters, clones in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, clone in zip(parameters, clones, strict=True):
                parameter.data.copy_(clone.data)
    elif wrapper is not None:
        raise UnknownInternals(
            f"DeepSpeed {version_of('deepspeed')}'s {type(wrapper).__name__} does not say how to give the model its "
            "fp32 weights; install a version of the table in docs/versions.md"
        )


def check_free(module: torch.nn.Module) -> None:
    """Raise ValueError if a DeepSpeed optimizer holds other weights of a model, which would overwrite loaded ones."""
    for name, parameter in module.named_parameters():
        if getattr(parameter, "_hp_mapping", None) is not None or hasattr(parameter, "_z3_optimizer"):
            raise ValueError(
                f"{name} belongs to a DeepSpeed engine, which keeps weights of its own and would overwrite it at the "
                "next step: pass the engine, not its module"
            )


def read_frozen(name: str, parameter: Any) -> LocalShard | None:
    """This rank's part of a ZeRO-3 parameter that no optimizer updates; None for any other parameter."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return None
    group = ShardGroup.of(parameter.ds_process_group)
    ranges = even_ranges(parameter.ds_numel, group.size)
    low, high = ranges[group.rank]
    return LocalShard(
        name=name,
        shape=tuple(parameter.ds_shape),
        dtype=parameter.dtype,
        device=partition.device,
        layout="zero",
        group=group,
        partition=FlatPartition(ranges) if group.size > 1 else whole_partition(parameter.ds_numel),
        weight=lambda: partition.data.view(-1)[: high - low],  # padding follows
        grad=lambda: None,
    )


def progress(engine: Any, wrapper: Any) -> dict[str, float]:
    """What changes in an engine beside weights and optimizer: steps, skipped steps, the dynamic loss scaler's state.

    Empty for None.
    """
    if engine is None:
        return {}
    scaler = _scaler(wrapper)
    scale = {key: getattr(scaler, key) for key in _SCALE if hasattr(scaler, key)}
    return {"global_steps": engine.global_steps, "skipped_steps": engine.skipped_steps, **scale}


def restore(engine: Any, wrapper: Any, step: int, saved: Mapping[str, float]) -> None:
    """Set the engine's counters to those after ``step`` steps, and its dynamic loss scaler to a saved state.

    Args:
        engine: DeepSpeed's.
        wrapper: its optimizer wrapper, or None.
        step: steps of training.
        saved: what ``progress`` returned; empty if something else than DeepSpeed trained.
    """
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.skipped_steps = saved.get("skipped_steps", 0)
    scaler = _scaler(wrapper)
    for key in _SCALE:
        if key in saved and hasattr(scaler, key):
            setattr(scaler, key, saved[key])


def _scaler(wrapper: Any) -> Any:
    for owner, scaler in (
        (wrapper, getattr(wrapper, "loss_scaler", None)),
        (getattr(wrapper, "loss_scale_config", None),) * 2,
    ):
        if scaler is not None and getattr(owner, "dynamic_loss_scale", False):
            return scaler
    return None
