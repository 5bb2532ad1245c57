"""What becomes of options that somebody changes in a parameter group between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .options import OPTIONS, make_plain, validate_options

# Read anew at every step, and free to change: the step after a change is the one that a process with these options
# from the start would take from the same weights and states. A projection is number ``step // update_proj_gap`` of its
# matrix, whatever the gap was before. ``lr`` changes at nearly every step, so it is looked at on its own.
_WATCHED = tuple(key for key in OPTIONS if key != "lr")

Group = dict[str, Any]


class OptionChanges:
    """Remembers the options of parameter groups, and judges what is new in them before a step."""

    def __init__(self) -> None:
        # By id: the group, which keeps its id its own; its number; its options.
        self._seen: dict[int, tuple[Group, int, tuple[Any, ...]]] = {}

    def remember(self, groups: Sequence[Group]) -> None:
        """Take the options of all of an optimizer's groups as they are; they were validated."""
        self._seen = {}
        for number, group in enumerate(groups):
            make_plain(group)
            self._seen[id(group)] = group, number, tuple(group[key] for key in _WATCHED)

    def check(self, groups: Sequence[Group], has_state: Callable[[Group], bool]) -> None:
        """Make the options of ``groups`` plain numbers, and accept what is new in them.

        Costs about a microsecond a group where nothing changed.

        Args:
            groups: those of this step; under DeepSpeed not all of them.
            has_state: whether parameters of a group have state already.

        Raises:
            ValueError: for a value that makes no sense, or a new ``rank`` where there is state: moments of one rank
                say nothing of another. States are as they were, and go on where the option is put back.
        """
        for place, group in enumerate(groups):
            make_plain(group)
            _, number, before = self._seen.get(id(group), (group, place, None))
            try:
                now = tuple([group[key] for key in _WATCHED])
                kind = type(group["lr"])
            except KeyError:
                now, kind = (), None
            if now == before and (kind is float or kind is int or isinstance(group.get("lr"), Tensor)):
                continue
            where = f"parameter group {number}"
            validate_options(group, where, step=True)
            if before is not None and has_state(group):
                _refuse_new_rank(where, dict(zip(_WATCHED, before, strict=True)), group)
            self._seen[id(group)] = group, number, now


def _refuse_new_rank(where: str, before: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    old, new = before["rank"], group["rank"]
    if old == new:
        return
    if old is None or new is None:
        kinds = {True: "AdamW's, in the shape of a parameter", False: "low-rank"}
        reason = f"the moments of its parameters are {kinds[old is None]}"
    else:
        reason = f"the moments of its matrices are of rank {old}, which say nothing of another projection"
    raise ValueError(
        f"{where}: rank was {old} and is now {new}, but {reason}. Put it back, or build a new optimizer, whose moments "
        "start at zero"
    )
