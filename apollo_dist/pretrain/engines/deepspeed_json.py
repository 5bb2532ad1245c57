"""DeepSpeed's JSON beside a recipe: which of the two decides, and what is an error.

A value in the JSON wins over the recipe's, and a line in the log says so; against a command-line option that differs
it is an error. The number of sequences per step and the learning-rate schedule are the recipe's alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_dist.pretrain.batching import BatchPlan
from apollo_dist.pretrain.config import Config, JsonOptimizer
from apollo_dist.pretrain.settings import Settings


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
            "train_micro_batch_size_per_gpu": plan.micro,
            "gradient_accumulation_steps": plan.accumulation,
            "gradient_clipping": config.gradient_clipping,  # DeepSpeed's own default is 1.0, not off
        }


def reconcile(settings: Settings) -> tuple[Config, DeepSpeedJson | None]:
    """The configuration with the JSON's values laid in; (config, None) without a JSON.

    Raises ValueError where the JSON cannot be read, asks for what does not work here, or contradicts the command line.
    """
    config = settings.config
    if config.deepspeed_config is None:
        return config, None
    path = config.deepspeed_config
    values = _read(path)
    _refuse(values, path, config)
    found: dict[str, Any] = {"precision": "bf16" if values.get("bf16", {}).get("enabled") else "fp32"}
    for key, name in (("micro_batch_size", "train_micro_batch_size_per_gpu"), ("gradient_clipping",) * 2):
        if name in values:
            found[key] = values[name]
    notes = []
    changed: dict[str, Any] = {}
    for key, value in found.items():
        own = getattr(config, key)
        if own == value:
            continue
        if key in settings.explicit:
            raise ValueError(f"--{key} {own} contradicts {path}, which has {value}: drop the option or change the file")
        changed[key] = value
        if own is not None:
            notes.append(f"{key} is {value} from {path}, not the recipe's {own}")
    if "optimizer" in values:
        given = sorted(key for key in settings.explicit if key.startswith("optimizer."))
        if given:
            raise ValueError(
                f"both {path} and the command line (--{given[0]}) name an optimizer: "
                'remove the file\'s "optimizer" block or the option'
            )
        block = values["optimizer"]
        changed["optimizer"] = JsonOptimizer(block["type"], dict(block.get("params", {})))
        notes.append(f"the optimizer is {block['type']} from {path}; the recipe's is not used")
    return dataclasses.replace(config, **changed), DeepSpeedJson(values, tuple(notes))


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


def _refuse(values: Mapping[str, Any], path: str, config: Config) -> None:
    automatic = [key for key, value in _flatten(values) if value == "auto"]
    if automatic:
        raise ValueError(f'{path}: {automatic[0]} is "auto", which only Hugging Face\'s Trainer fills in: give a value')
    if "scheduler" in values:
        raise ValueError(
            f'{path} has a "scheduler" block, but the recipe sets the schedule (warmup_steps, min_lr_ratio, steps): '
            "remove the block"
        )
    if values.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path} enables fp16: use bf16, or fp32")
    size = values.get("train_batch_size", config.batch_size)
    if size != config.batch_size:
        raise ValueError(
            f"{path} has train_batch_size {size} and the run has batch_size {config.batch_size}: "
            f"remove it from the file or pass --batch_size {size}"
        )
    block = values.get("optimizer", {"type": ""})
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise ValueError(f'{path}: the "optimizer" block is {block!r}: it must have a "type"')


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
