"""Values that a resumed run may change: ``--resume --override steps,lr``.

A checkpoint's facts say what the run computes, and a run that resumes it must have the same ones. Of these a user may
change what only says how training goes on. What says what the saved state means (moments, projections, the limiter's
norms, the position in the data, the count of tokens) stays: with another value there the state would be that of no run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Keys by what they decide. An optimizer from DeepSpeed's JSON has its options under ``optimizer.params``.
SCHEDULE = ("steps", "warmup_steps", "min_lr_ratio", "optimizer.lr")
OPTIONS = ("optimizer.lr", "optimizer.eps", "optimizer.weight_decay", "optimizer.scale")
ALLOWED = (*SCHEDULE[:3], *OPTIONS, "gradient_clipping", "recipe", "weights")
# Why the others cannot change, by key or section.
REASONS = {
    "batch_size": "the checkpoint counts tokens and data in steps of the old size",
    "data": "the position in the data is one in the old data",
    "model": "the weights are those of the old model",
    "optimizer.betas": "moments and their bias correction would be of different averages",
    "optimizer.disable_nl": "the limiter's norms are those of the last step that it saw",
    "optimizer.name": "the state is that of the old optimizer",
    "optimizer.proj": "moments were taken in projections of the old kind",
    "optimizer.rank": "moments have the old rank",
    "optimizer.scale_type": "the limiter's norms are those of updates with the old scaling factors",
    "optimizer.type": "the state is that of the old optimizer",
    "optimizer.update_proj_gap": "moments were taken in projections that are counted in the old gap",
    "precision": "weights were rounded as the old precision does",
    "seed": "projections and the order of the data are drawn from it",
    "sequence_length": "the data was cut into sequences of the old length",
}
_JSON = "optimizer.params."


def parse_override(text: str | None, full_name: Mapping[str, str]) -> frozenset[str]:
    """The keys of ``--override``, spelled out.

    Args:
        text: keys with commas between them; None: no key.
        full_name: what short names stand for.

    Raises:
        ValueError: for a key that no resumed run may change, with the reason.
    """
    words = [word.strip() for word in (text or "").split(",")]
    keys = frozenset(full_name.get(word, word) for word in words if word)
    for key in sorted(keys):
        if key not in ALLOWED:
            short = {full: word for word, full in full_name.items()}
            allowed = ", ".join(short.get(name, name) for name in dict.fromkeys(ALLOWED))
            reason = why_not(key) or "no value of a checkpoint has that name; what is not compared needs no override"
            raise ValueError(f"--override {short.get(key, key)}: {reason}. A resumed run may change {allowed}")
    return keys


def why_not(key: str) -> str:
    """Why a resumed run cannot have another value of ``key``: a clause, empty where nothing is known of the key."""
    key = _plain(key)
    return REASONS.get(key) or REASONS.get(key.partition(".")[0], "")


def _plain(key: str) -> str:
    """The key that an option of the JSON's optimizer stands for."""
    return "optimizer." + key.removeprefix(_JSON) if key.startswith(_JSON) else key


def flat_params(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with each option of the JSON's optimizer under a key of its own."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if key == "optimizer.params" and isinstance(value, dict):
            flat |= {_JSON + inner: one for inner, one in value.items()}
        else:
            flat[key] = value
    return flat


@dataclass(frozen=True)
class Change:
    """A key of a run with its value in the checkpoint and now."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.was!r} and is {self.now!r}"


def changes(
    saved: Mapping[str, Any], own: Mapping[str, Any], override: frozenset[str], step: int, where: str
) -> list[Change]:
    """How this run's facts differ from the checkpoint's, if all of it is allowed.

    Args:
        saved: the checkpoint's facts.
        own: this run's.
        override: keys that may differ.
        step: the checkpoint's.
        where: the checkpoint, for the message.

    Raises:
        ValueError: if another key differs, or the run would end before the checkpoint, with what can be done about it.
    """
    saved, own = flat_params(saved), flat_params(own)
    found = [Change(k, saved.get(k), own.get(k)) for k in {**saved, **own} if saved.get(k) != own.get(k)]
    left = [change for change in found if _plain(change.key) not in override]
    if left:
        fixed = [change for change in left if _plain(change.key) not in ALLOWED]
        reasons = [why_not(each.key) if each in fixed else "" for each in left]
        shown = "; ".join(f"{each} ({why})" if why else f"{each}" for each, why in zip(left, reasons, strict=True))
        allow = ",".join(dict.fromkeys(_plain(change.key) for change in found if change not in fixed))
        hint = "Resume with the same values" + ("" if fixed else f", or allow the new ones: --override {allow}")
        raise ValueError(f"checkpoint {where} belongs to another run: {shown}. {hint}")
    if own["steps"] < step:
        raise ValueError(
            f"--steps {own['steps']} is less than the {step} steps of checkpoint {where}: it would be over"
        )
    return found


def options_now(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the optimizer's groups have before a checkpoint is loaded: this run's own options."""
    keys = [key.removeprefix("optimizer.") for key in OPTIONS]
    return [{"lr": g["initial_lr"], **{k: g[k] for k in keys if k != "lr" and k in g}} for g in groups]


def apply(
    found: Sequence[Change], groups: Sequence[dict[str, Any]], own: Sequence[Mapping[str, Any]], schedule: Any
) -> None:
    """Give a loaded optimizer this run's values of what was overridden, and its learning rate of the next step.

    Args:
        found: what was overridden.
        groups: the optimizer's, as they were loaded.
        own: `options_now` of before.
        schedule: the learning rate's, a ``LambdaLR`` that was loaded.
    """
    changed = {_plain(change.key) for change in found}
    for group, options in zip(groups, own, strict=True):
        for key, value in options.items():
            if f"optimizer.{key}" in changed:
                group["initial_lr" if key == "lr" else key] = value
    if changed & set(SCHEDULE):
        schedule.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
            rate = group["initial_lr"] * factor(schedule.last_epoch)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        schedule._last_lr = [group["lr"] for group in groups]
