"""The names of rules, as parameter groups say them: ``{"params": ..., "rule": "apollo"}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import adam_mini, adamw, apollo, scale, sgd
from .base import Rules

RULE = "rule"
_RULES: dict[str, Rules] = {}


def register(name: str, rules: Rules) -> None:
    """Let parameter groups name ``rules``; every process that trains or loads such groups must do so.

    Raises:
        ValueError: if the name is that of other rules.
    """
    if _RULES.setdefault(name, rules) != rules:
        raise ValueError(f"a rule named {name!r} exists already")


def rules_named(name: str) -> Rules:
    """The rules of that name; ValueError if there are none."""
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"unknown rule {name!r}. There are {', '.join(map(repr, sorted(_RULES)))}")
    return _RULES[name]


def rules_of(group: Mapping[str, Any], own: Rules) -> Rules:
    """The rules that a parameter group names; ``own``, the optimizer's, where it names none."""
    name = group.get(RULE)
    return own if name is None else rules_named(name)


def matrix_options() -> set[str]:
    """The options of all rules that matrices read, and no other parameters."""
    found = set[str]()
    for rules in _RULES.values():
        found |= rules.matrix_options
    return found


def matrix_rules() -> set[str]:
    """The names by which logs and checkpoints know all rules for matrices."""
    return {rules.matrix.name for rules in _RULES.values() if rules.matrix is not None}


register("apollo", Rules(apollo.APOLLO(), adamw.AdamW()))
register("scale", Rules(scale.SCALE(), scale.DecayFirst()))
register("adam_mini", Rules(adam_mini.AdamMini(), adam_mini.Bias()))
register("sgd", Rules(None, sgd.SGD()))
register("adamw", Rules(None, adamw.TorchAdamW()))
register("hf_adamw", Rules(None, adamw.AdamW()))
