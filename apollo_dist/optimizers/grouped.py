"""Parameter groups as an optimizer is given them, made complete and checked before it takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..rules.groups import COMMON, SELECT_BY_NAME, options_of
from ..rules.registry import RULE, rules_of
from ..state.identity import NAMES, check_seed_of_group
from .options import check_group_keys, drop_other_keywords, make_plain, validate_options
from .parameters import check_named_alike, named_parameters, split_params

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..selection.kept import KeptChoice
    from .members import Members
    from .model_ref import ModelRef

Group = dict[str, Any]


def given_groups(
    params: Any, rules: Rules, options: Mapping[str, Any], choice: KeptChoice, title: str,
    choose: Callable[..., list[Group]],
) -> tuple[list[Group], bool]:  # fmt: skip
    """The groups that an optimizer is built from.

    Args:
        params: a model, parameters, (name, parameter) pairs, or groups.
        rules: of groups that name none.
        options: of the optimizer.
        choice: of low-rank matrices, for what it was asked to exclude, or to take as well.
        title: the optimizer's name, for messages.
        choose: ``param_groups.chosen_groups``.

    Returns:
        The groups, to be added one by one, and whether the library chooses the low-rank matrices of those without a
        rank.

    Raises:
        ValueError: for ``exclude`` or ``embeddings`` where nothing is chosen, and for what ``as_groups`` and
            ``without_choice`` refuse.
    """
    model = params if isinstance(params, nn.Module) else None
    if not is_chosen(rules):
        if choice.asked:
            raise ValueError(f"{choice.asked} is for low-rank matrices, of which {title} has none")
        return as_groups(params if model is None else named_parameters(model)), False
    rank = options["rank"]
    # A group that says rank=None is AdamW's, unless no group says anything else.
    if model is not None:
        others = {key: value for key, value in options.items() if key != "rank"}
        return [
            {"rank": None, **group} for group in choose(model, rules, rank, choice.exclude, choice.embeddings, others)
        ], True
    groups = [without_choice(group, rank) if group.get(RULE) is None else group for group in as_groups(params)]
    mine = [group for group in groups if group.get(RULE) is None]
    chosen = bool(mine) and all(group.get("rank") is None for group in mine)
    if chosen and all("rank" in group for group in mine):
        for group in mine:
            del group["rank"]
    if choice.asked and not chosen:
        raise ValueError(
            f"{choice.asked} has no effect on groups with a rank; put parameters that are to be excluded into a group "
            "without rank, and those that are to be low-rank into one with a rank"
        )
    return groups, chosen


class Prepared(NamedTuple):
    """A group that is ready to be added.

    Attributes:
        group: with all options of its rules, and its parameters in ``pairs``.
        pairs: (name or None, parameter).
        choose: whether the library chooses low-rank matrices among them.
        others: keys that belong to other tools.
    """

    group: Group
    pairs: list[tuple[str | None, Tensor]]
    choose: bool
    others: list[str]


def prepare_group(
    given: Mapping[str, Any], where: str, *, rules: Rules, defaults: Mapping[str, Any], members: Members,
    model: ModelRef, seed: int, later: bool,
) -> Prepared:  # fmt: skip
    """Make a group complete, and check all that can be said of its options.

    Args:
        given: the group, which is left as it is.
        where: for messages.
        rules: of groups that name none.
        defaults: the options of the optimizer.
        members: its parameters so far.
        model: which may name parameters that come without names.
        seed: of the optimizer.
        later: whether the optimizer is built already.

    Raises:
        ValueError: for unknown keys, bad values, or parameters named unlike those that are there.
    """
    group, optimizers = dict(given), rules
    rules = rules_of(group, rules)
    by_default = group.get(RULE) is None
    if by_default and later and members.chosen:
        group = without_choice(group, defaults["rank"])
    check_seed_of_group(group, seed, where)
    drop_other_keywords(group, where)
    others = check_group_keys(group, where, options_of(rules), rules.options)
    make_plain(group, rules)
    pairs = model.named(split_params(group["params"], group.pop(NAMES, None)))
    check_named_alike(pairs, where, members.named)
    choose = by_default and members.chosen and "rank" not in group
    if by_default and not members.chosen and is_chosen(rules):
        group.setdefault("rank", None)
    if choose:
        group[SELECT_BY_NAME] = True
    declared = {key: option.default for key, option in rules.options.items()}
    shared = options_of(rules) if rules == optimizers else COMMON
    group = {**declared, **{key: defaults[key] for key in shared}, **group}
    validate_options(group, where, rules)
    return Prepared(group, list(pairs), choose, others)


def is_chosen(rules: Rules) -> bool:
    """Whether the matrices of these rules are chosen: by a group's rank, else by the library."""
    return rules.matrix is not None and rules.matrix.chosen


def without_choice(group: Group, rank: int) -> Group:
    """A group of another APOLLO's ``param_groups`` as it was given to that: without a rank, if it came without.

    Raises:
        ValueError: if its matrices were chosen for another rank than ``rank``.
    """
    if not group.get(SELECT_BY_NAME):
        return group
    if group.get("rank") not in (None, rank):
        raise ValueError(
            f"a parameter group comes from an APOLLO that chose matrices for rank {group['rank']}, and this one is to "
            f"choose for rank {rank}: pass rank={group['rank']}, or give the group a rank and no {SELECT_BY_NAME!r}"
        )
    return {key: value for key, value in group.items() if key not in (SELECT_BY_NAME, "rank")}


def as_groups(params: Any) -> list[Group]:
    """Parameters, named parameters or groups as a list of groups.

    Raises:
        ValueError: for an empty list, a set, or parameters and groups in one list.
    """
    if isinstance(params, (set, frozenset)):
        split_params(params)  # which refuses it
    items = [params] if isinstance(params, Tensor) else list(params)
    if not items:
        raise ValueError("APOLLO got an empty parameter list")
    if any(isinstance(item, dict) for item in items):
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("pass either parameters or parameter groups, not both in one list")
        return [dict(item) for item in items]
    return [{"params": items}]


class Before(NamedTuple):
    """Groups and members as they are before a group is added, to be put back if that fails."""

    groups: list[tuple[Group, list[Tensor], list[str]]]
    given: list[Tensor]
    infos: dict[int, Any]
    low_rank: dict[str, bool]

    @classmethod
    def of(cls, groups: Sequence[Group], members: Members) -> Before:
        """What there is now."""
        kept = [(group, list(group["params"]), list(group.get(NAMES, ()))) for group in groups]
        return cls(kept, list(members.given), dict(members.infos), dict(members.choice.low_rank))

    def restore(self, groups: list[Group], members: Members) -> None:
        """Put it back."""
        del groups[len(self.groups) :]
        for group, params, names in self.groups:
            group.update(params=params, **({NAMES: names} if NAMES in group else {}))
        members.given, members.infos, members.choice.low_rank = self.given, self.infos, self.low_rank
