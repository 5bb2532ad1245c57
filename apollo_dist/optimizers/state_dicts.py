"""torch's protocol of state dicts: ``state_dict`` and ``load_state_dict`` of an optimizer, with their hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..distributed import check_same_on_all_ranks, rank_of, run_together
from ..rules.registry import rules_of
from ..state.loaded import Loaded, tell
from .options import make_plain

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .parts import Parts


def state_dict(optimizer: Optimizer, parts: Parts, seed: int) -> dict[str, Any]:
    """As ``ShardedOptimizer.state_dict``, of an optimizer that consists of these parts."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    store, groups, plans = parts.store, optimizer.param_groups, parts.plans.built.values()
    for group in groups:
        make_plain(group, rules_of(group, parts.rules))
    store.check_saved(p for group in groups for p in group["params"])
    found = store.collect(plans)
    if found:
        _name_parameters(groups, parts, seed)
    store.identify(groups, seed)
    result = store.as_dict(groups, found, plans)
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        changed = post_hook(optimizer, result)
        result = result if changed is None else changed
    return result


def load_state_dict(optimizer: Optimizer, parts: Parts, seed: int, state_dict: Mapping[str, Any]) -> None:
    """As ``ShardedOptimizer.load_state_dict``, of an optimizer that consists of these parts."""
    given = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, given)
        given = given if changed is None else changed
    # Nothing changes on any rank before all have read it.
    loaded = run_together(lambda: _read(optimizer.param_groups, parts, seed, given), parts.group)
    check_same_on_all_ranks(loaded.facts(), parts.group)
    parts.store.take_accepted()
    if rank_of() == 0:
        tell(loaded.notes)
    parts.store.take(loaded)
    parts.plans.forget()
    parts.following.forget()
    optimizer.param_groups = loaded.groups
    parts.changes.forget()
    parts.changes.remember(loaded.groups)
    parts.show(loaded.groups)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _read(groups: list[dict[str, Any]], parts: Parts, seed: int, state_dict: Mapping[str, Any]) -> Loaded:
    """Read and judge a state dict; local."""
    if any(isinstance(key, int) for key in state_dict["state"]):
        _name_parameters(groups, parts, seed)
    parts.store.identify(groups, seed)
    return parts.store.read(state_dict, groups, seed, parts.following.model.module)


def _name_parameters(groups: list[dict[str, Any]], parts: Parts, seed: int) -> None:
    """Know the parameters that tools have put into the groups, as far as the model is known."""
    if parts.following.model.module is not None and not parts.members.knows_all(groups):
        parts.plans.follow(groups, seed)
