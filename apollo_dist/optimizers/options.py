"""The options of parameter groups: which there are, and what makes their values good or bad."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# Options of a parameter group that only low-rank matrices read. A group whose ``rank`` is None takes AdamW.
LOW_RANK_DEFAULTS: dict[str, Any] = {
    "scale": 1.0,
    "scale_type": "channel",
    "update_proj_gap": 200,
    "proj": "random",
    "proj_type": "std",
    "scale_front": False,
    "disable_nl": False,
}
COMMON = ("lr", "betas", "eps", "weight_decay", "maximize")
OPTIONS = (*COMMON, "rank", *LOW_RANK_DEFAULTS)
# Keys that torch's schedulers and other tools add to groups; they mean nothing here and are let through.
FOREIGN = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
# Keywords of torch's own optimizers: what asks for nothing that is not done anyway, and why the rest is refused.
_TORCH_KEYWORDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "foreach": ((None,), "APOLLO always takes its tensors in batches, and has no other way"),
    "fused": ((None, True), "APOLLO's kernels are always fused"),
    "capturable": ((False,), "step() counts in Python, so a CUDA graph would repeat one and the same step"),
    "differentiable": ((False,), "the step works in place, outside of autograd"),
    "amsgrad": ((False,), "APOLLO has no maximum of second moments"),
    "decoupled_weight_decay": ((True,), "APOLLO's weight decay is always decoupled"),
}


def check_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError if a key is not among the known ones, with the list and the nearest match."""
    known = tuple(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {what} {key!r}.{hint} Supported: {', '.join(known)}")


def drop_torch_keywords(given: dict[str, Any], where: str) -> None:
    """Take the keywords of torch's optimizers out of ``given``: those that ask for what APOLLO does anyway.

    Raises:
        ValueError: for a value that asks for something else, with the reason.
    """
    for key, (accepted, reason) in _TORCH_KEYWORDS.items():
        if key in given:
            value = given.pop(key)
            if not any(value is one for one in accepted):
                hint = " or ".join(map(str, accepted))
                raise ValueError(f"{where}: {key}={value!r} is not supported: {reason}. Leave it out, or pass {hint}")


def validate_options(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, naming the value and ``where`` it stands, if a group's options make no sense."""

    def refuse(key: str, want: str) -> None:
        hint = '; "auto" is for the Hugging Face Trainer to fill in, elsewhere write a value'
        raise ValueError(f"{where}: {key} must be {want}, got {options[key]!r}{hint if options[key] == 'auto' else ''}")

    def number(key: str) -> float:
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            refuse(key, "a number")
        return float(value)

    lr = options["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            refuse("lr", "a number, or a tensor of one floating-point number")
        number_of_lr = float(lr)
    else:
        number_of_lr = number("lr")
    if not number_of_lr >= 0.0:
        refuse("lr", ">= 0")
    betas = options["betas"]
    numbers = isinstance(betas, (tuple, list)) and all(isinstance(beta, (int, float)) for beta in betas)
    if not (numbers and len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)):
        refuse("betas", "two numbers in [0, 1)")
    for key in ("eps", "weight_decay"):
        if not number(key) >= 0.0:
            refuse(key, ">= 0")
    if not isinstance(options["maximize"], bool):
        refuse("maximize", "True or False")
    rank = options["rank"]
    if rank is None:
        return
    for key in ("rank", "update_proj_gap"):
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(key, "an integer >= 1")
    if not number("scale") > 0.0:
        refuse("scale", "> 0")
    if options["scale_type"] not in ("channel", "tensor"):
        refuse("scale_type", '"channel" or "tensor"')
    if options["proj"] != "random":
        refuse("proj", '"random" (the only projection of APOLLO that needs no SVD)')
    if options["proj_type"] != "std":
        refuse("proj_type", '"std" (rows or columns by shape, the smaller dimension is projected)')
    for key in ("scale_front", "disable_nl"):
        if not isinstance(options[key], bool):
            refuse(key, "True or False")
