"""DeepSpeed's JSON beside a recipe: which of the two decides, and what is an error.

A value in the JSON wins over the recipe's, and a line in the log says so; against a command-line option that differs
it is an error. The exceptions are how many sequences a step has and how they are divided, and the learning-rate
schedule: those are the run's. The JSON's micro-batch counts where neither the recipe nor the command line has one.
"auto" stands for the run's own value.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from apollo_dist.pretrain.optimizer_config import JsonOptimizer
from apollo_dist.pretrain.settings import Settings, convert

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config

AUTO = "auto"
MICRO = "train_micro_batch_size_per_gpu"
# What `DeepSpeedJson.complete` writes, whatever the JSON says.
RUN_DECIDES = ("train_batch_size", MICRO, "gradient_accumulation_steps", "gradient_clipping")


@dataclass(frozen=True)
class DeepSpeedJson:
    """The JSON's values as DeepSpeed will get them, and what was decided on the way."""

    values: Mapping[str, Any]
    notes: tuple[str, ...]

    def complete(self, config: Config, plan: BatchPlan) -> dict[str, Any]:
        """The dict for ``deepspeed.initialize``: nothing that this package decides is left to DeepSpeed's defaults."""
        return {
            **self.values,
            "train_batch_size": plan.batch_size,
            MICRO: plan.micro,
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_clipping": config.gradient_clipping,  # DeepSpeed's own default is 1.0, not off
        }


def reconcile(settings: Settings, world: int) -> tuple[Config, DeepSpeedJson | None]:
    """The configuration with the JSON's values laid in; (config, None) without a JSON.

    Raises ValueError where the JSON cannot be read, asks for what does not work here, or contradicts the command line.
    """
    config = settings.config
    if config.deepspeed_config is None:
        return config, None
    path = config.deepspeed_config
    values = _fill(_read(path), path, config)
    _refuse(values, path, config)
    changed, notes = _divided(values, path, settings, world)
    found: dict[str, Any] = {"precision": "bf16" if _block(values, "bf16", path).get("enabled") else "fp32"}
    if "gradient_clipping" in values:
        found["gradient_clipping"] = convert(values["gradient_clipping"], float, f"{path}: gradient_clipping")
    for key, value in found.items():
        own = getattr(config, key)
        if own == value:
            continue
        if key in settings.explicit:
            raise ValueError(f"--{key} {own} contradicts {path}, which has {value}: drop the option or change the file")
        changed[key] = value
        notes.append(f"{key} is {value} from {path}, not the recipe's {own}")
    if "optimizer" in values:
        given = sorted(key for key in settings.explicit if key.startswith("optimizer."))
        if given:
            raise ValueError(
                f"both {path} and the command line (--{given[0]}) name an optimizer: "
                'remove the file\'s "optimizer" block or the option'
            )
        block = _block(values, "optimizer", path)
        changed["optimizer"] = JsonOptimizer(block["type"], dict(_block(block, "params", f"{path}: optimizer")))
        notes.append(f"the optimizer is {block['type']} from {path}; the recipe's is not used")
    return dataclasses.replace(config, **changed), DeepSpeedJson(values, tuple(notes))


def _divided(values: Mapping[str, Any], path: str, settings: Settings, world: int) -> tuple[dict[str, Any], list[str]]:
    """What the JSON's micro-batch changes in the configuration, and the line about it."""
    if MICRO not in values:
        return {}, []
    config = settings.config
    own, theirs = config.micro_batch_size, cast(int, convert(values[MICRO], int, f"{path}: {MICRO}"))
    if own is not None or "micro_batch_size" in settings.explicit:
        source = "the command line" if "micro_batch_size" in settings.explicit else "the recipe"
        size = "batch_size / ranks" if own is None else own
        return {}, [f"micro_batch_size is {size} from {source}, not {path}'s {theirs}"] if own != theirs else []
    share = config.batch_size // world
    if theirs <= share or not share:
        return {"micro_batch_size": theirs}, []
    return {"micro_batch_size": share}, [f"micro_batch_size is batch_size / ranks = {share}, below {path}'s {theirs}"]


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"deepspeed_config {path!r} does not exist")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed_config {path!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"deepspeed_config {path!r} holds no JSON object")
    return values


def _fill(values: dict[str, Any], path: str, config: Config) -> dict[str, Any]:
    """``values`` with this run's values for "auto": left out where `DeepSpeedJson.complete` writes them anyway.

    Raises ValueError for any other "auto".
    """
    filled = {key: value for key, value in values.items() if not (key in RUN_DECIDES and value == AUTO)}
    for key, enabled in (("bf16", config.precision == "bf16"), ("fp16", False)):
        block = _block(values, key, path)
        if block.get("enabled") == AUTO:
            filled[key] = {**block, "enabled": enabled}
    left = [key for key, value in _flatten(filled) if value == AUTO]
    if left:
        known = ", ".join([*RUN_DECIDES, "bf16.enabled", "fp16.enabled"])
        raise ValueError(
            f'{path}: {left[0]} is "auto", for which only Hugging Face\'s Trainer has a value: give one, or remove the '
            f'key for DeepSpeed\'s default (here "auto" works for {known})'
        )
    return filled


def _refuse(values: Mapping[str, Any], path: str, config: Config) -> None:
    if "scheduler" in values:
        raise ValueError(
            f'{path} has a "scheduler" block, but the recipe sets the schedule (warmup_steps, min_lr_ratio, steps): '
            "remove the block"
        )
    if "bfloat16" in values:
        raise ValueError(f'{path}: "bfloat16" is DeepSpeed\'s old name of "bf16": rename it')
    if _block(values, "fp16", path).get("enabled"):
        raise ValueError(f"{path} enables fp16: use bf16, or fp32")
    size = values.get("train_batch_size", config.batch_size)
    if size != config.batch_size:
        raise ValueError(
            f"{path} has train_batch_size {size} and the run has batch_size {config.batch_size}: "
            f"remove it from the file or pass --batch_size {size}"
        )
    if "optimizer" in values and not isinstance(_block(values, "optimizer", path).get("type"), str):
        raise ValueError(f'{path}: the "optimizer" block is {values["optimizer"]!r}: it must have a "type"')


def _block(values: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    """The object under ``key``, empty if there is none; ValueError if it is something else."""
    block = values.get(key, {})
    if not isinstance(block, dict):
        raise ValueError(f"{path}: {key} is {block!r}: it must be an object, in braces")
    return block


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
