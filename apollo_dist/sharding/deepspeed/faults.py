"""Faults of released DeepSpeed versions under which gradients are wrong, whatever the optimizer, or nothing trains.

Each was seen with ``torch.optim.AdamW`` against one process; the versions are those that were run, and between them the
code is the same. ``python -m apollo_dist lint`` names them, and the optimizer refuses an engine that has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

Config = Mapping[str, Any]
Version = tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """What is wrong in the DeepSpeed versions ``first`` <= version < ``mended``, where ``hits(config)``.

    ``mended`` is None where the newest version that was run has the fault.
    """

    first: str
    mended: str | None
    hits: Callable[[Config], bool]
    key: str
    reason: str
    remedy: str


def _zero(config: Config) -> Config:
    zero = config.get("zero_optimization")
    return zero if isinstance(zero, Mapping) else {}


def _offloads(config: Config) -> bool:
    offload = _zero(config).get("offload_optimizer")
    return isinstance(offload, Mapping) and offload.get("device", "none") not in ("none", "auto")


def accumulation(config: Config) -> int:
    """Micro-batches in a step as the configuration says; 1 where it leaves that to others."""
    value = config.get("gradient_accumulation_steps", 1)
    return value if isinstance(value, int) else 1


def _checks_overflow(config: Config) -> bool:
    return _enabled(config, "fp16") or (_enabled(config, "bf16") and config["bf16"].get("check_grad_overflow") is True)


def _enabled(config: Config, key: str) -> bool:
    section = config.get(key)
    return isinstance(section, Mapping) and section.get("enabled") is True


def _stage(config: Config) -> Any:
    return _zero(config).get("stage", 0)


def _scales_loss(config: Config) -> bool:
    return _enabled(config, "fp16") and config["fp16"].get("loss_scale") != 1


def _sums_in_fp32(config: Config) -> bool:
    types = config.get("data_types")
    return isinstance(types, Mapping) and types.get("grad_accum_dtype") == "fp32"


_UNSCALED = "gradients are divided by the loss scale, by which the loss was not multiplied"

FAULTS = (
    Fault(
        "0.18.3",
        None,
        lambda c: _stage(c) == 0 and _scales_loss(c),
        "fp16.enabled",
        f"at stage 0 {_UNSCALED}",
        'write a stage from 1 to 3, use bf16, or write "loss_scale": 1',
    ),
    Fault(
        "0.17.6",
        "0.18.6",
        lambda c: _stage(c) == 0 and _enabled(c, "bf16"),
        "bf16.enabled",
        "at stage 0 gradients are never cleared, so that each step adds those of all earlier ones, and from 0.18.3 on "
        + _UNSCALED,
        "write a stage from 1 to 3, or install another version",
    ),
    Fault(
        "0.18.3",
        "0.18.5",
        lambda c: _stage(c) == 1 and _enabled(c, "bf16") and _sums_in_fp32(c) and not _offloads(c),
        "data_types.grad_accum_dtype",
        f"at stage 1 with fp32 sums {_UNSCALED}",
        "remove it, write another stage, or install another version",
    ),
    Fault(
        "0.17.1",
        "0.18.2",
        lambda c: _zero(c).get("stage") == 1 and not _offloads(c) and _checks_overflow(c),
        "zero_optimization.stage",
        "at stage 1 each rank looks for overflow in its own gradients alone, so that one rank leaves a step out and "
        "the others take it",
        "write 2, use bf16 without check_grad_overflow, or install another version",
    ),
    Fault(
        "0.17.6",
        "0.18.3",
        lambda c: _zero(c).get("stage") == 2 and not _offloads(c) and accumulation(c) > 1,
        "gradient_accumulation_steps",
        "at stage 2 only the last of several micro-batches reaches the optimizer",
        "write 1, use another stage, or install another version",
    ),
    Fault(
        "0",
        "0.19.0",
        lambda c: _zero(c).get("stage") == 2 and _offloads(c) and accumulation(c) > 2,
        "gradient_accumulation_steps",
        "at stage 2 with offload_optimizer only the first and the last of more than two micro-batches reach the "
        "optimizer",
        "write 1 or 2, use another stage, or install another version",
    ),
)

# Settings that older versions ignore without a word: dotted key -> the first version that reads it.
ADDED = {
    "bf16.check_grad_overflow": "0.17.1",
    "bf16.bf16_master_weights_and_grads": "0.18.3",
    "bf16.bf16_optimizer_states": "0.18.3",
    "torch_autocast": "0.17.2",
    "data_types.param_dtype": "0.19.4",
    "data_types.buffer_dtype": "0.19.4",
    "data_types.keep_in_fp32_modules": "0.19.8",
    "datastates_ckpt": "0.18.1",
    "disable_python_gc": "0.19.8",
    "expert_parallel": "0.19.4",
    "gradient_allreduce_op": "0.19.8",
    "log_level": "0.19.4",
    "managed_gradient_accumulation": "0.19.4",
}


def installed() -> str | None:
    """The version of the DeepSpeed that is installed, or None."""
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def older_than(version: str) -> bool:
    """Whether the installed DeepSpeed is older than a version; False if none is installed."""
    numbers = _numbers(installed())
    return bool(numbers) and numbers < _numbers(version)


def known_faults(config: Config, version: str | None) -> Iterator[str]:
    """One line for each fault of a DeepSpeed version that a configuration meets.

    Args:
        config: the configuration as a dictionary.
        version: such as "0.18.1" or "0.18.1+cu128"; None finds nothing.
    """
    numbers = _numbers(version)
    for fault in FAULTS if numbers else ():
        since, mended = _numbers(fault.first) <= numbers, fault.mended and _numbers(fault.mended) <= numbers
        if since and not mended and fault.hits(config):
            wrong = "" if fault.first == "0" else f"from {fault.first} "
            wrong += f"to {fault.mended} exclusively" if fault.mended else "on"
            yield (
                f"{fault.key}: DeepSpeed {version} is wrong here with every optimizer, without a word ({wrong.strip()}"
                f"): {fault.reason}; {fault.remedy}"
            )


def not_yet(config: Config, version: str | None) -> Iterator[str]:
    """One line for each setting that a DeepSpeed version does not read yet."""
    numbers = _numbers(version)
    for name, first in ADDED.items() if numbers else ():
        section, _, key = name.rpartition(".")
        held = config.get(section) if section else config
        if isinstance(held, Mapping) and key in held and numbers < _numbers(first):
            yield f"{name}: DeepSpeed {version} does not read this key yet; remove it, or install {first} or later"


def _numbers(version: str | None) -> Version:
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, found.group().split("."))) if found else ()
