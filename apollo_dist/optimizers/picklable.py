"""Copies and pickles of an optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..state.identity import check_projections

if TYPE_CHECKING:
    from .parts import Parts

# Attributes of the optimizer that a pickle or a deep copy keeps as they are; hooks and schedulers are left out, as in
# torch. And those of its parts: the key, and the attribute of the part.
_OWN = ("defaults", "param_groups", "seed", "exclude", "cache_projection", "kernels")
_MEMBERS = {"_choose": "chosen", "_choice": "choice", "_roles": "roles", "_from_model": "of_model", "_given": "given"}
_STATE = {"_restored": "restored", "_trained": "trained", "_generation": "generation"}


def pickled(attributes: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """What a pickle or a deep copy of an optimizer holds, alone or together with its model.

    Args:
        attributes: of the optimizer.
        parts: what it consists of.

    Raises:
        ValueError: with a process group, which no pickle can hold.
    """
    if parts.group is not None:
        raise ValueError("an optimizer with a process_group cannot be pickled or copied: use state_dict()")
    members, store = parts.members, parts.store
    kept = {key: attributes[key] for key in _OWN}
    kept |= {key: getattr(members, name) for key, name in _MEMBERS.items()}
    kept |= {key: getattr(store, name) for key, name in _STATE.items()}
    kept["_guard"] = parts.guard
    kept["pending"], kept["slots"] = store.copied(parts.plans.built.values())
    kept["members"] = [members.infos[id(p)] for p in members.given]
    kept["foreign"] = store.foreign()
    return kept


def restored(state: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Fill new parts with what ``pickled`` returned; what is left are the optimizer's own attributes.

    Raises:
        ValueError: for moments of an older version's projections.
    """
    state = {key: value for key, value in state.items() if key != "_guard"}
    if state["slots"] or state["pending"]:
        check_projections(state["param_groups"])
    members, store = parts.members, parts.store
    for key, name in _MEMBERS.items():
        setattr(members, name, state.pop(key))
    for key, name in _STATE.items():
        setattr(store, name, state.pop(key))
    infos, foreign = state.pop("members"), state.pop("foreign")
    members.infos = {id(p): m for p, m in zip(members.given, infos, strict=True)}
    members.rank = state["defaults"].get("rank", 0)
    store.slots, store.pending = state.pop("slots"), state.pop("pending")
    store.shown = defaultdict(dict, foreign)
    return state
