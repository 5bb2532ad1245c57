"""Parameter groups as rules see them: which options they have, and which rule updates a parameter of theirs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .registry import rules_of
from .roles import ROLE, Role

if TYPE_CHECKING:
    from .base import ElementRule, MatrixRule, Rules

# Options that the step reads, whatever the rule.
STOCHASTIC_ROUNDING = "stochastic_rounding"
COMMON = ("lr", "weight_decay", "maximize", STOCHASTIC_ROUNDING)


@lru_cache
def options_of(rules: Rules) -> tuple[str, ...]:
    """The options of a parameter group that follows ``rules``: what its rules declare, and what all have."""
    first = tuple(rules.element.options)
    return "lr", *first, *COMMON[1:], *(key for key in rules.options if key not in first)


# Set by the optimizer on groups whose members the library chooses: they came without a rank.
SELECT_BY_NAME = "choose_by_name"


class Views:
    """Parameter groups as rules see them: live, and with the role of a parameter where the rule reads that.

    Parameters of one group and role share a view, since what shares a view can be batched.

    Args:
        own: the optimizer's rules, for groups that name none.
    """

    def __init__(self, own: Rules) -> None:
        self._own = own
        self._known: dict[tuple[int, Role], Mapping[str, Any]] = {}

    def of(self, group: Mapping[str, Any], role: Role) -> Mapping[str, Any]:
        """The view of a group for parameters of that role."""
        if not rules_of(group, self._own).reads_role:
            return group
        return self._known.setdefault((id(group), role), ChainMap({ROLE: role}, group))  # type: ignore[arg-type]


def rule_of(
    group: Mapping[str, Any], name: str, shape: Sequence[int], own: Rules, chosen: Mapping[str, bool]
) -> MatrixRule | ElementRule:
    """The rule that updates a parameter.

    Args:
        group: its parameter group.
        name, shape: of the parameter.
        own: the optimizer's rules, for groups that name none.
        chosen: of parameters that the library decides on, by name whether the matrix rule takes them.
    """
    rules = rules_of(group, own)
    return rules.element if group.get(SELECT_BY_NAME) and not chosen[name] else rules.rule_of(shape, group)
