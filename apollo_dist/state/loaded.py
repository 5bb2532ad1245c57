"""A state dict that is loaded: read, and judged at once, by one rank alone, before anything changes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import identity
from .identity import IDENTITY
from .slots import HELD, STEP, Slot, copied, step_tensor

logger = logging.getLogger("apollo_dist")

# Keys of other optimizers' states that tell whose they are.
_OTHERS = {
    "state1": "bitsandbytes'",
    "projector": "apollo-torch's or GaLore's",
    "scaled_grad": "apollo-torch's",
    "momentum_buffer": "SGD's or Muon's",
    "square_avg": "RMSprop's",
    "exp_avg_sq_row": "Adafactor's",
}


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Target:
    """A parameter of the optimizer that loads.

    Attributes:
        name: canonical; ``param_3`` where none was given.
        matrix: shapes of its state by name if the matrix rule updates it; None where that cannot be.
        element: the same for the element rule.
        low_rank: whether the matrix rule updates it; None where that is decided at the first step.
        trained: whether it requires a gradient.
        matrix_names: names of the matrix rule's state that the element rule does not have.
        element_rule: the element rule's name.
    """

    name: str
    matrix: Shapes | None
    element: Shapes
    low_rank: bool | None
    trained: bool
    matrix_names: Collection[str]
    element_rule: str

    def by_matrix_rule(self, value: Mapping[str, Any]) -> bool:
        """Whether the matrix rule is to take over a state; where that is open, whether the state is its."""
        return self.low_rank if self.low_rank is not None else _fits(value, self.matrix)


@dataclass
class Loaded:
    """What a state dict brings.

    Attributes:
        groups: parameter groups, with the options that were saved and the parameters of the optimizer that loads.
        pending: state by name of the parameter.
        slots: state by name of the matrix or tensor, as this rank held it (DeepSpeed).
        foreign: state under keys that are none of ours, kept as it is.
        notes: what was decided, one line each, for the log.
    """

    groups: list[dict[str, Any]]
    pending: dict[str, dict[str, Any]] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    foreign: dict[Hashable, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        """What all ranks must have loaded alike, where state goes by parameter: else they would step apart."""
        return {f"loaded state of {name}": _described(state) for name, state in self.pending.items()}


def read(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    targets: Sequence[Sequence[Target]] | None,
    *,
    seed: int,
    accepted: Collection[str],
    validate: Callable[[dict[str, Any], str], None],
    decided_here: Collection[str],
    options_of: Callable[[Mapping[str, Any]], Sequence[str]],
) -> Loaded:
    """Read a state dict, and judge whether it continues here.

    Args:
        state_dict: as ``state_dict()`` gave it, also through torch.distributed.checkpoint.
        groups: the live parameter groups; nothing is changed.
        targets: their parameters; None where an engine has put tensors of its own into the groups.
        seed: of the optimizer that loads.
        accepted: of "seed", "names", "projections" what may differ.
        validate: makes options plain numbers, in place; raises ValueError for bad ones.
        decided_here: keys of groups that are not loaded.
        options_of: for a group the keys whose change is told.

    Raises:
        ValueError: for a state of another seed, of other projections, names, ranks, shapes, or of another optimizer.
    """
    saved = deepcopy(list(state_dict["param_groups"]))
    sizes, here = ([len(group["params"]) for group in each] for each in (saved, groups))
    if sizes != here:
        raise ValueError(f"the loaded state is of parameter groups with {sizes} parameters, and here they have {here}")
    result = Loaded([])
    version = identity.version_of(saved)
    if "seed" not in accepted:
        identity.check_seed(saved, seed)
    keys = _keys(saved, targets, version, "names" in accepted, result.notes)
    saved = [saved[number] for number, _ in keys]
    for number, (group, live) in enumerate(zip(saved, groups, strict=True)):
        _check_rule(group, live, number)
        result.groups.append(_merged(group, live, number, options_of(live), decided_here, result.notes))
        validate(result.groups[-1], f"parameter group {number} of the loaded state")
    _read_state(state_dict["state"], [listed for _, listed in keys], targets, result)
    if "projections" not in accepted and (result.pending or result.slots):
        identity.check_projections(saved)
    if version is None and (result.pending or result.slots):
        result.notes.append(
            "the loaded state was saved by version 0.1 of apollo_dist, without seed and names: they are taken to be "
            "those of this optimizer"
        )
    return result


def _keys(
    saved: Sequence[dict[str, Any]],
    targets: Sequence[Sequence[Target]] | None,
    version: int | None,
    any_names: bool,
    notes: list[str],
) -> list[tuple[int, list[Hashable]]]:
    """For each group here the number of the loaded one, and the keys of its parameters' states in the order of here."""
    as_saved: list[tuple[int, list[Hashable]]] = [(i, list(group["params"])) for i, group in enumerate(saved)]
    by_fqn = any(isinstance(key, str) for _, keys in as_saved for key in keys)
    if targets is None or version is None or any_names or by_fqn:
        # torch.distributed.checkpoint goes by name itself: parameters are those of here, whatever was saved.
        return as_saved
    then, now = identity.saved_names(saved), [[target.name for target in group] for group in targets]
    if then == now:
        return as_saved
    found = identity.arrange(then, now)
    if found is None:
        raise identity.names_differ(then, now)
    notes.append("parameters or groups come in another order than they were saved in: the state goes by their names")
    return [(number, [saved[number]["params"][i] for i in positions]) for number, positions in found]


def _check_rule(saved: Mapping[str, Any], live: Mapping[str, Any], number: int) -> None:
    # A state of before rules had names has none.
    was, now = saved.get("rule"), live.get("rule")
    if was != now:
        raise ValueError(
            f"the rule of parameter group {number} was {was!r} when the state was saved, and here it is {now!r} (None: "
            "the optimizer's own). Build the optimizer with the groups that were saved, or go on without its state"
        )
    if "rank" in saved and "rank" in live and saved["rank"] != live["rank"]:
        was, now = ("none, so AdamW" if rank is None else rank for rank in (saved["rank"], live["rank"]))
        raise ValueError(
            f"the rank of parameter group {number} was {was} when the state was saved, and here it is {now}: moments "
            "of one rank say nothing to another. Build the optimizer with the rank that was saved, or go on without "
            "the optimizer's state"
        )
    for key in ("proj", "proj_type"):
        was, now = (group.get(key, live.get(key)) for group in (saved, live))
        if was != now and saved.get("rank") is not None:
            raise ValueError(
                f"{key} of parameter group {number} was {was!r} when the state was saved, and here it is {now!r}: its "
                f"moments would go on under other projections. Build the optimizer with the {key} that was saved, or "
                "go on without the optimizer's state"
            )


def _merged(
    saved: Mapping[str, Any],
    live: Mapping[str, Any],
    number: int,
    options: Sequence[str],
    decided_here: Collection[str],
    notes: list[str],
) -> dict[str, Any]:
    """A loaded group's options on a live group's parameters; what was not saved stays as it is."""
    kept = {"params", *IDENTITY, *decided_here}
    group = {key: value for key, value in saved.items() if key not in kept}
    # Tuples come back from a checkpoint as lists.
    if "betas" in group:
        group["betas"] = tuple(group["betas"])
    for key in options:
        if key in group and key != "lr" and _differs(group[key], live[key]):
            notes.append(f"{key} of parameter group {number} was {live[key]} and is {group[key]}, as it was saved")
    return {**{key: live[key] for key in live if key in kept or key not in group}, **group}


def _differs(one: Any, other: Any) -> bool:
    return bool(tuple(one) != tuple(other)) if isinstance(one, (list, tuple)) else bool(one != other)


def _read_state(
    state: Mapping[Hashable, Any],
    keys: Sequence[Sequence[Hashable]],
    targets: Sequence[Sequence[Target]] | None,
    result: Loaded,
) -> None:
    by_key = {key: (g, i) for g, listed in enumerate(keys) for i, key in enumerate(listed)}
    pending: dict[str, tuple[Target, dict[str, Any]]] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and HELD in value:
            result.slots[str(key)] = copied(value)
        elif key in by_key:
            if _is_empty(value):
                continue
            if targets is None:
                raise ValueError(
                    "the loaded state is that of whole or DTensor parameters, which an engine has replaced here; use "
                    "apollo_dist.checkpoint to continue under another engine"
                )
            g, i = by_key[key]
            target = targets[g][i]
            pending[target.name] = target, _judged(target, value, result.notes)
        elif isinstance(value, Mapping) and STEP in value:
            raise ValueError(f"the loaded state has {key!r}, which is in no parameter group")
        else:
            result.foreign[key] = copied(value)
    if targets is None or not pending:
        return
    _check_any_matrix(list(pending.values()))
    result.pending = {name: state for name, (_, state) in pending.items()}
    missing = [t.name for group in targets for t in group if t.trained and t.name not in pending]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        result.notes.append(f"the loaded state has nothing for {len(missing)} parameters, which start anew: {shown}")


def _is_empty(value: Any) -> bool:
    """Nothing, also as torch.distributed.checkpoint makes it of keys that a flattened checkpoint lacks."""
    return isinstance(value, Mapping) and all(isinstance(one, Mapping) and not one for one in value.values())


def _judged(target: Target, value: Any, notes: list[str]) -> dict[str, Any]:
    """A copy of the state of one parameter; ValueError if it is not one of this optimizer's for that parameter."""
    name = target.name
    if not isinstance(value, Mapping):
        raise ValueError(f"the loaded state of {name} is a {type(value).__name__}, not a dictionary")
    by_matrix = target.by_matrix_rule(value)
    if not by_matrix and _only_matrix(target, value):
        raise ValueError(
            f"the loaded state of {name} is low-rank, and here {name} takes {target.element_rule}: the choice of "
            "low-rank matrices differs. Build the optimizer from the same groups, rank= and exclude= as before"
        )
    shapes = target.matrix if by_matrix and target.matrix is not None else target.element
    missing = [key for key in (STEP, *shapes) if key not in value]
    if missing:
        raise ValueError(_no_state_of_ours(target, value, missing))
    for key, shape in shapes.items():
        if not _has_shape(value[key], shape):
            got = tuple(value[key].shape) if isinstance(value[key], Tensor) else type(value[key]).__name__
            raise ValueError(
                f"the loaded state has {key} of shape {got} for {name}, and here it is {tuple(shape)}: the rank, the "
                "choice of low-rank matrices or the model differ"
            )
    step = value[STEP]
    if isinstance(step, Mapping) or (isinstance(step, Tensor) and step.numel() != 1) or not _is_count(float(step)):
        raise ValueError(f"the loaded state of {name} has step {step!r}, which is no number of steps")
    known = (STEP, *shapes)
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        notes.append(f"of the loaded state of {name} nothing here reads {', '.join(unknown)}")
    state = {key: copied(value[key]) for key in known}
    return {**state, STEP: step_tensor(step)}


def _is_count(step: float) -> bool:
    return math.isfinite(step) and step >= 0 and step == int(step)


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value is a tensor of that shape; of one number per matrix also a number, or () for (1,)."""
    if len(shape) < 2 and isinstance(value, (int, float)):
        return shape in ((), (1,))
    if not isinstance(value, Tensor):
        return False
    return tuple(value.shape) == tuple(shape) or (shape == () and value.numel() == 1)


def _fits(value: Mapping[str, Any], shapes: Shapes | None) -> bool:
    return shapes is not None and all(key in value and _has_shape(value[key], shapes[key]) for key in shapes)


def _only_matrix(target: Target, value: Mapping[str, Any]) -> bool:
    """Whether a state is the matrix rule's and cannot be the element rule's."""
    return not _fits(value, target.element) and any(key in value for key in target.matrix_names)


def _no_state_of_ours(target: Target, value: Mapping[str, Any], missing: Sequence[str]) -> str:
    whose = next((_OTHERS[key] for key in _OTHERS if key in value), None)
    has = ", ".join(map(str, value)) or "nothing"
    if whose is None and _fits(value, target.element):
        whose = f"{target.element_rule}'s"
    guess = f" (it looks like {whose})" if whose else ""
    return (
        f"the loaded state of {target.name} has {has}, and no {', '.join(missing)}: it is of another optimizer{guess}, "
        "or of another choice of low-rank matrices. State of another optimizer cannot be continued: load the weights "
        "alone and let the optimizer start anew"
    )


def _check_any_matrix(pairs: Sequence[tuple[Target, Mapping[str, Any]]]) -> None:
    """Raise ValueError if none of the matrices among which some will be low-rank has a state of the matrix rule."""
    undecided = [(t, s) for t, s in pairs if t.low_rank is None and t.matrix is not None]
    if undecided and not any(t.matrix is not None and _fits(s, t.matrix) for t, s in pairs):
        target, state = undecided[0]
        raise ValueError(_no_state_of_ours(target, state, [k for k in target.matrix_names if k not in state]))


def _described(state: Mapping[str, Any]) -> object:
    """What two ranks must have alike of the state of a parameter."""
    described: list[tuple[object, ...]] = []
    for key, value in state.items():
        if not isinstance(value, Tensor):
            described.append((key, value))
        elif key == STEP:
            described.append((key, float(value)))
        else:
            placements = [str(p) for p in getattr(value, "placements", ())]
            described.append((key, tuple(value.shape), type(value).__name__, placements, getattr(value, "rows", None)))
    return sorted(described, key=repr)


def tell(notes: Sequence[str]) -> None:
    """One log line with what was decided while a state was loaded; none if nothing was."""
    if notes:
        logger.warning("load_state_dict: %s", "; ".join(notes[:8]) + ("; ..." if len(notes) > 8 else ""))
