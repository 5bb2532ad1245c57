"""The names of rules, as parameter groups say them: ``{"params": ..., "rule": "apollo"}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Rules

RULE = "rule"
_RULES: dict[str, Rules] = {}


def register(name: str, rules: Rules) -> Rules:
    """Let parameter groups name ``rules``, and return them; every process that trains or loads such groups must do so.

    Raises:
        ValueError: if the name is that of other rules.
    """
    if _RULES.setdefault(name, rules) != rules:
        raise ValueError(f"a rule named {name!r} exists already")
    return rules


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
