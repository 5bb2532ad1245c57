"""What becomes of options that somebody changes in a parameter group between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..rules.groups import options_of
from ..rules.registry import RULE, rules_of
from .options import make_plain, validate_options

if TYPE_CHECKING:
    from ..rules.base import Rules

Group = dict[str, Any]


@lru_cache
def _watched(rules: Rules) -> tuple[str, ...]:
    """The options whose changes are judged.

    They are read anew at every step, and free to change: the step after a change is the one that a process with these
    options from the start would take from the same weights and states. A projection is number
    ``step // update_proj_gap`` of its matrix, whatever the gap was before. ``lr`` changes at nearly every step, so it
    is looked at on its own.
    """
    return tuple(key for key in options_of(rules) if key != "lr")


class OptionChanges:
    """Remembers the options of parameter groups, and judges what is new in them before a step.

    Args:
        own: rules of groups that name none.
    """

    def __init__(self, own: Rules) -> None:
        self._own = own
        # By id: the group, which keeps its id its own; its number; its rule's name; its options.
        self._seen: dict[int, tuple[Group, int, str | None, tuple[Any, ...]]] = {}

    def forget(self) -> None:
        """Know no groups any more."""
        self._seen = {}

    def remember(self, groups: Sequence[Group]) -> None:
        """Take the options of all of an optimizer's groups as they are; they were validated."""
        self._seen = {}
        for number, group in enumerate(groups):
            rules = rules_of(group, self._own)
            make_plain(group, rules)
            self._seen[id(group)] = group, number, group.get(RULE), tuple(group[key] for key in _watched(rules))

    def check(self, groups: Sequence[Group], has_state: Callable[[Group], bool]) -> None:
        """Make the options of ``groups`` plain numbers, and accept what is new in them.

        Costs about a microsecond a group where nothing changed.

        Args:
            groups: those of this step; under DeepSpeed not all of them.
            has_state: whether parameters of a group have state already.

        Raises:
            ValueError: for a value that makes no sense, or one that the state does not fit, such as a new ``rank``.
                States are as they were, and go on where the option is put back.
        """
        for place, group in enumerate(groups):
            _, number, rule, before = self._seen.get(id(group), (group, place, group.get(RULE), None))
            where = f"parameter group {number}"
            if group.get(RULE) != rule:
                raise ValueError(
                    f"{where}: rule was {rule!r} and is now {group.get(RULE)!r}. Put it back, or build a new optimizer"
                )
            rules = rules_of(group, self._own)
            make_plain(group, rules)
            try:
                now = tuple([group[key] for key in _watched(rules)])
                kind = type(group["lr"])
            except KeyError:
                now, kind = (), None
            if now == before and (kind is float or kind is int or isinstance(group.get("lr"), Tensor)):
                continue
            validate_options(group, where, rules, step=True)
            if before is not None and has_state(group):
                reason = rules.refuses_change(dict(zip(_watched(rules), before, strict=True)), group)
                if reason:
                    raise ValueError(
                        f"{where}: {reason}. Put it back, or build a new optimizer, whose moments start at zero"
                    )
            self._seen[id(group)] = group, number, rule, now
