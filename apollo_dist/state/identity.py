"""Whose state a state dict holds: the keys of a parameter group that say so, and their comparison at load.

A projection follows from the seed, the name of its matrix and the number of the refresh, so moments mean something
only together with the seed and the name under which they were made. Both travel in ``param_groups``, in ``state_dict``
and in the live optimizer, since that is what survives ``torch.save``, torch.distributed.checkpoint (nested and
flattened), DeepSpeed's files and pickles::

    seed             of the projections, an int
    state_version    of the form of the state and the definition of projections, an int; version 0.1 wrote none
    param_names      canonical names of the group's parameters, in their order; absent where they came without names
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..sharding.names import canonical_name

STATE_VERSION = 2
# Since version 2 normal entries of projections come from a table; before, from Box and Muller's transform.
PROJECTIONS = 2
SEED, VERSION, NAMES = "seed", "state_version", "param_names"
IDENTITY = (SEED, VERSION, NAMES)

Group = Mapping[str, Any]


def identify(groups: Sequence[dict[str, Any]], seed: int) -> None:
    """Write seed and version into live parameter groups."""
    for group in groups:
        group[SEED], group[VERSION] = seed, STATE_VERSION


def check_seed_of_group(group: dict[str, Any], seed: int, where: str) -> None:
    """Take seed and version out of a group that is given to an optimizer: they come from other groups of ours.

    Raises:
        ValueError: for another seed than the optimizer's.
    """
    group.pop(VERSION, None)
    if group.pop(SEED, seed) != seed:
        raise ValueError(f"{where}: seed is one for all groups; pass it to the optimizer, APOLLO(..., seed=...)")


def version_of(groups: Sequence[Group]) -> int | None:
    """The version of a loaded state; None for version 0.1 of this library, and for other optimizers.

    Raises:
        ValueError: if it is newer than this library.
    """
    newest: int | None = max((int(group[VERSION]) for group in groups if VERSION in group), default=None)
    if newest is not None and newest > STATE_VERSION:
        raise ValueError(
            f"the loaded state has version {newest}, and this apollo_dist knows versions up to {STATE_VERSION}: "
            "install the version of apollo_dist that saved it, or a newer one"
        )
    return newest


def check_seed(groups: Sequence[Group], seed: int) -> None:
    """Raise ValueError if a state was made with another seed."""
    for saved in (group[SEED] for group in groups if SEED in group):
        if saved != seed:
            raise ValueError(
                f"the loaded state was made with projections of seed {saved}, and here the seed is {seed}: its moments "
                f"would go on under other projections. Build the optimizer with seed={saved} to continue exactly; or "
                'call optimizer.accept_at_load("seed") before loading to go on with the new seed'
            )


def check_projections(groups: Sequence[Group]) -> None:
    """Raise ValueError for low-rank moments that were made with projections as older versions generated them."""
    if any(group.get("rank") is not None and int(group.get(VERSION, 0)) < PROJECTIONS for group in groups):
        raise old_projections("the loaded state", "load_state_dict")


def old_projections(what: str, loading: str) -> ValueError:
    """The error for low-rank moments of before version 2.

    Args:
        what: is loaded.
        loading: the function that loads it.
    """
    return ValueError(
        f"{what} was saved by an older apollo_dist, whose random projections were generated in another way: its "
        "low-rank moments would go on under other projections. Continue with the version that saved it; or load the "
        'weights alone; or call optimizer.accept_at_load("projections") before '
        f"{loading} to go on with the new projections, which is no exact continuation"
    )


def saved_names(groups: Sequence[Group]) -> list[list[str]]:
    """Names of the parameters of a loaded state by group: as given, or by position."""
    names, position = [], 0
    for group in groups:
        count = len(group["params"])
        given = group.get(NAMES)
        by_position = [f"param_{i}" for i in range(position, position + count)]
        names.append([canonical_name(str(name)) for name in given] if given else by_position)
        position += count
    return names


def arrange(saved: Sequence[Sequence[str]], here: Sequence[Sequence[str]]) -> list[tuple[int, list[int]]] | None:
    """How loaded groups and parameters go to those of the optimizer that loads, by name.

    Args:
        saved: names by loaded group.
        here: names by group of the optimizer; groups may come in another order, and parameters in a group too.

    Returns:
        For each group here the number of the loaded one, and for each parameter its position in that; None where no
        loaded group has the same names.
    """
    numbers = {frozenset(names): number for number, names in enumerate(saved) if len(set(names)) == len(names)}
    found = []
    for names in here:
        number = numbers.pop(frozenset(names), None)
        if number is None:
            return None
        positions = {name: i for i, name in enumerate(saved[number])}
        found.append((number, [positions[name] for name in names]))
    return found


def names_differ(saved: Sequence[Sequence[str]], here: Sequence[Sequence[str]]) -> ValueError:
    """The error for parameters that had other names."""
    pairs = ((g, i, a, b) for g, (old, new) in enumerate(zip(saved, here, strict=True))
             for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)  # fmt: skip
    group, position, before, now = next(pairs)
    return ValueError(
        f"parameter {position} of group {group} was named {before} when the state was saved, and here it is {now}: "
        "projections are drawn by name, so its moments would go on under other projections. Build the optimizer from "
        "the same named parameters, best as APOLLO(model), to continue exactly; or call "
        'optimizer.accept_at_load("names") before loading to go on by position, with the projections of the new names'
    )
