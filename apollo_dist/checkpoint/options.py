"""The options of parameter groups (lr, betas, ...): what a checkpoint keeps of them, and how they come back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..distributed import rank_of
from ..optimizers.options import plain
from ..rules.registry import RULE, matrix_options, matrix_rules
from ..state.identity import IDENTITY

logger = logging.getLogger("apollo_dist")

# Of a parameter group: not options, or decided by the optimizer that loads, such as how weights and moments are stored.
_NOT_OPTIONS = frozenset({
    "params", "name", "rank", RULE, "choose_by_name", "stochastic_rounding", "adam_dtype", *IDENTITY,
})  # fmt: skip


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that a checkpoint keeps: plain numbers, words and lists of them."""
    options = {}
    for key, value in group.items():
        if key in _NOT_OPTIONS:
            continue
        value = plain(value)
        value = list(value) if isinstance(value, tuple) else value
        items = value if isinstance(value, list) else [value]
        if all(isinstance(v, (bool, int, float, str, type(None))) for v in items):
            options[key] = value
    return options


def restore_options(groups: Sequence[tuple[dict[str, Any], list[str]]], saved: Mapping[str, Any]) -> None:
    """Give each parameter group the options (lr, betas, ...) that its parameters had when they were saved.

    Groups may be divided differently here. Options that only matrix rules read are taken from their matrices.
    Parameters that the checkpoint's optimizer did not hold have no say.

    Args:
        groups: the live groups, each with the names of its parameters.
        saved: the checkpoint's description.

    Raises:
        ValueError: if parameters of one group had different values of an option.
    """
    told = []
    options = {name: g["options"] for g in saved["optimizer"]["groups"] for name in g["parameters"]}
    kinds, of_matrices = {"low-rank", *matrix_rules()}, matrix_options()
    matrices = {name for name, about in saved["parameters"].items() if about["kind"] in kinds}
    for number, (group, held) in enumerate(groups):
        names = [name for name in held if name in options]
        before = {key: plain(group.get(key)) for key in ("lr", "weight_decay")}
        for key in dict.fromkeys(key for name in names for key in options[name]):
            if key not in group and key in of_matrices:
                continue
            readers = [n for n in names if n in matrices] if key in of_matrices else names
            values = [options[name][key] for name in readers if key in options[name]]
            if not values:
                continue
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"parameters of group {number} had different values of {key} when they were saved: {values[0]} "
                    f"and {next(v for v in values if v != values[0])}. Give them groups of their own"
                )
            _set(group, key, values[0], number)
        told.append(f"group {number}: " + ", ".join(_told(key, was, plain(group[key])) for key, was in before.items()))
    if rank_of() == 0:
        more = f" and {len(told) - 8} more groups" if len(told) > 8 else ""
        logger.info("learning rate and decay are the checkpoint's: %s%s", "; ".join(told[:8]), more)


def _told(key: str, was: Any, now: Any) -> str:
    return f"{key} {now}" if was == now else f"{key} {now} (was {was})"


def _set(group: dict[str, Any], key: str, value: Any, number: int) -> None:
    old = group.get(key)
    if isinstance(old, Tensor):
        old.fill_(value)
        return
    value = tuple(value) if isinstance(value, list) else value
    if key not in ("lr", "weight_decay", "step") and old != value and old is not None:
        logger.warning("parameter group %d: %s was %s and is %s, from the checkpoint", number, key, old, value)
    group[key] = value
