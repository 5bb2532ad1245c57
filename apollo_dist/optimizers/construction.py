"""How an optimizer is built, and takes parameter groups: the local parts, which may fail on one rank only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..distributed import rank_of
from ..kernels.table import check as check_kernels
from ..rules.groups import options_of
from ..rules.registry import rules_of
from ..selection.choice import check_embeddings, name_pattern
from ..sharding import fsdp2
from ..sharding.deepspeed import zero
from ..state.identity import NAMES, identify
from .grouped import given_groups, is_chosen, prepare_group
from .options import check_known, drop_other_keywords, make_plain, validate_options

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .parts import Parts
    from .plans import Settings

logger = logging.getLogger("apollo_dist")

# Arguments that are no options of groups.
_ARGUMENTS = (
    "seed", "exclude", "embeddings", "cache_projection", "kernels", "skip_nonfinite", "max_skipped_steps", "model",
    "process_group",
)  # fmt: skip


def checked_groups(
    parts: Parts, settings: Settings, params: Any, options: dict[str, Any], unknown: dict[str, Any],
    choose: Callable[..., list[dict[str, Any]]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Check an optimizer's arguments, and find its groups.

    Args:
        parts: of the optimizer.
        settings, params: its arguments.
        options: of its groups; made Python's own numbers.
        unknown: keywords that are no argument of the optimizer.
        choose: ``param_groups.chosen_groups``.

    Raises:
        ValueError: for bad arguments.
    """
    drop_other_keywords(unknown, parts.title)
    check_known(unknown, [*options_of(parts.rules), *_ARGUMENTS], "argument")
    make_plain(options, parts.rules)
    validate_options(options, parts.title, parts.rules)
    parts.guard.check()
    if isinstance(settings.seed, bool) or not isinstance(settings.seed, int):
        raise ValueError(f"seed must be an integer, got {settings.seed!r}")
    if settings.cache_projection not in ("auto", True, False):
        raise ValueError(f'cache_projection must be "auto", True or False, got {settings.cache_projection!r}')
    check_kernels(settings.kernels)
    members = parts.members
    name_pattern(members.choice.exclude)
    check_embeddings(members.choice.embeddings)
    parts.following.model.check(params)
    members.of_model, members.rank = isinstance(params, nn.Module), options.get("rank", 0)
    groups, members.chosen = given_groups(params, parts.rules, options, members.choice, parts.title, choose)
    return groups


def after_groups(parts: Parts, groups: list[dict[str, Any]]) -> None:
    """Decide what can be decided once all groups are there.

    Raises:
        ValueError: if nothing would be low-rank.
    """
    members, model = parts.members, parts.following.model.module
    if is_chosen(parts.rules):
        fsdp2.check_right(members.given)
    if not members.chosen or members.of_model:
        return
    if model is not None:
        members.decide(groups, members.names(), zero.Engine(), model)
    else:
        # The engine, or a model that is attached, may know more at the first step.
        members.choice.check(members.to_choose({}), members.rank)


def add_group(
    optimizer: Optimizer, parts: Parts, seed: int, given: dict[str, Any], add: Callable[[dict[str, Any]], None], *,
    later: bool,
) -> None:  # fmt: skip
    """Add a parameter group.

    Args:
        optimizer, parts, seed: what gets it.
        given: the group.
        add: torch's own ``add_param_group``.
        later: whether the optimizer is built already.

    Raises:
        ValueError: for a group that cannot be taken; ``Before`` then puts back what is half done.
    """
    members, model, rules = parts.members, parts.following.model, parts.rules
    groups, defaults = optimizer.param_groups, optimizer.defaults
    number = len(groups)
    group, pairs, choose, others = prepare_group(
        given, f"parameter group {number}", rules=rules, defaults=defaults, members=members, model=model,
        seed=seed, later=later,
    )  # fmt: skip
    tensors, named = [tensor for _, tensor in pairs], members.named
    if later:
        members.leave(groups, tensors, parts.store.trained)
    added = members.admit(number, pairs, choose=choose, rank=group.get("rank"))
    group["params"] = tensors
    if named or any(m.named for m in added.values()):
        group[NAMES] = [added[id(p)].name for p in tensors]
        for earlier in groups:  # empty so far, as this one may be
            earlier.setdefault(NAMES, [])
    known = options_of(rules_of(group, rules))
    read = {key for key in group if key not in defaults or key in known}
    add(group)
    for key in defaults.keys() - read:  # which torch has added
        del group[key]
    identify(groups, seed)
    members.add(added, tensors)
    if later and choose and model.module is not None:
        members.decide(groups, members.names(), zero.Engine(), model.module)
    if model.module is not None and members.reads_roles(groups):
        members.decide_roles(model.module)
    parts.changes.remember(groups)
    if others and rank_of() == 0:
        keys = ", ".join(map(repr, others))
        logger.info("parameter group %d keeps %s, which APOLLO does not read", number, keys)
