"""The options of parameter groups: which there are, and what makes their values good or bad."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..rules.groups import STOCHASTIC_ROUNDING, options_of
from ..rules.options import flag, not_negative
from ..rules.registry import RULE

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..rules.options import Option

# Keys of parameter groups that mean something to torch or its schedulers, and nothing here.
_TORCH_KEYS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
# Other optimizers' names for these options: a group that has one is taken for a mistake, not for another tool's key.
_ALIASES = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
}
# Keywords of other optimizers: what asks for nothing that is not done anyway, and why the rest is refused.
_OTHER_KEYWORDS: dict[str, tuple[tuple[Any, ...], str]] = {
    # Which implementation computes one and the same result is nobody's business but the optimizer's.
    "foreach": ((None, True, False), "APOLLO always takes its tensors in batches"),
    "fused": ((None, True, False), "APOLLO's kernels are always fused"),
    "capturable": ((False,), "step() counts in Python, so a CUDA graph would repeat one and the same step"),
    "differentiable": ((False,), "the step works in place, outside of autograd"),
    "amsgrad": ((False,), "APOLLO has no maximum of second moments"),
    "decoupled_weight_decay": ((True,), "APOLLO's weight decay is always decoupled"),
    "adam_w_mode": ((True,), "APOLLO's weight decay is always decoupled"),
    "correct_bias": ((True,), "APOLLO always corrects the bias of its moments"),
    "bias_correction": ((True,), "APOLLO always corrects the bias of its moments"),
    "no_deprecation_warning": ((None, True, False), "APOLLO has no deprecation warning"),
}


def plain(value: Any) -> Any:
    """A number as Python's own, whatever library it comes from; lists and tuples by their items; all else as it is.

    Numpy's scalars are ``numbers.Real``, but a checkpoint that holds one cannot be read with ``weights_only=True``.
    A tensor or array of one element counts as its number, which waits for the device if the tensor is on one.
    """
    if isinstance(value, (bool, str, torch.dtype)):
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is bool:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def make_plain(options: dict[str, Any], rules: Rules) -> None:
    """Make the numbers among the options of a group ``plain``, in place, lists tuples, and dtypes their names.

    A tensor as ``lr`` stays one, since its owner may change it in place. Cheap where there is nothing to do: it is
    called at every step, because schedulers write what they like.

    Args:
        options: a parameter group.
        rules: that it follows; of other tools' values only numbers are made plain.
    """
    known = options_of(rules)
    for key, value in options.items():
        kind = type(value)
        if kind in _PLAIN or key in ("params", "param_names"):
            continue
        if kind is tuple and all(type(item) in _PLAIN for item in value):
            continue
        if isinstance(value, torch.Tensor) and key == "lr":
            continue
        if key not in known and not _is_number(value):
            continue
        if key in known and kind is torch.dtype:
            value = str(value).removeprefix("torch.")
        options[key] = tuple(map(plain, value)) if key in known and kind is list else plain(value)


def _is_number(value: Any) -> bool:
    """Whether another tool's value is a number of some library, or some of them; its tensors are its own."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_number, value))
    return isinstance(value, numbers.Real) or (
        getattr(value, "shape", None) == () and not isinstance(value, torch.Tensor)
    )


_PLAIN = frozenset((int, float, bool, str, type(None)))


def check_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError if a key is not among the known ones, with the list, and the one that it is a misspelling of."""
    known = tuple(known)
    for key in given:
        if key not in known:
            meant = misspelling_of(key, known)
            hint = f" Did you mean {meant!r}?" if meant else ""
            raise ValueError(f"unknown {what} {key!r}.{hint} Supported: {', '.join(known)}")


def check_group_keys(
    group: Iterable[str], where: str, options: Iterable[str], declared: Mapping[str, Option] | None = None
) -> list[str]:
    """Tell the keys of a parameter group that belong to other tools from misspelled options.

    Args:
        group: the keys.
        where: for the message.
        options: those of the group's rules.
        declared: as their rules declare them.

    Returns:
        The keys that mean nothing here (``lr_scale``, ``group_name``, ...); torch's own are not among them.

    Raises:
        ValueError: for a key that is nearly an option's name, or its name in another package.
    """
    others = []
    elsewhere = {option.elsewhere: key for key, option in (declared or {}).items()}
    options = (*options, RULE)
    for key in group:
        if key in options or key in _TORCH_KEYS:
            continue
        meant = elsewhere.get(key) or misspelling_of(key, options)
        if meant is not None:
            raise ValueError(
                f"{where}: unknown key {key!r}. Did you mean {meant!r}? Options are {', '.join(options)}; any other "
                "key is kept for the tool that reads it, unless it looks like one of these"
            )
        others.append(key)
    return others


def misspelling_of(key: Any, known: Iterable[str]) -> str | None:
    """The name in ``known`` that ``key`` is a misspelling of, or another optimizer's name for; None if there is none.

    Names that merely contain one another, such as ``lr_scale`` and ``scale``, mean different things: to follow a hint
    from one to the other would change the update.
    """
    if not isinstance(key, str):
        return None
    letters = _letters(key)
    for name in known:
        wanted = _letters(name)
        if letters == wanted or _ALIASES.get(key.lower()) == name:
            return name
        allowed = 2 if len(wanted) >= 8 else 1
        if len(wanted) <= 3:  # nearly every short word is one letter away from "lr"
            near = letters == f"{wanted}s" or (len(letters) == len(wanted) and sorted(letters) == sorted(wanted))
        else:
            near = _distance(letters, wanted) <= allowed
        if near:
            return name
    return None


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _distance(a: str, b: str) -> int:
    """How many letters to insert, delete, exchange or swap with their neighbour turn ``a`` into ``b``."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def drop_other_keywords(given: dict[str, Any], where: str) -> None:
    """Take the keywords of other optimizers out of ``given``: those that ask for what APOLLO does anyway.

    Raises:
        ValueError: for a value that asks for something else, with the reason.
    """
    for key, (accepted, reason) in _OTHER_KEYWORDS.items():
        if key in given:
            value = plain(given.pop(key))
            if not any(value is one for one in accepted):
                hint = " or ".join(map(str, accepted))
                raise ValueError(f"{where}: {key}={value!r} is not supported: {reason}. Leave it out, or pass {hint}")


def validate_options(options: Mapping[str, Any], where: str, rules: Rules, *, step: bool = False) -> None:
    """Raise ValueError, naming the value and ``where`` it stands, if a group's options make no sense.

    Args:
        options: a parameter group.
        rules: that it follows.
        where: for the message.
        step: between steps, where a tensor is not waited for, and a schedule may overshoot to below zero.
    """
    options = dict(options)
    make_plain(options, rules)

    def refuse(key: str, want: str) -> None:
        value = options[key]
        hint = '; "auto" is for the Hugging Face Trainer to fill in, elsewhere write a value'
        raise ValueError(
            f"{where}: {key} must be {want}, got {value!r}{hint if type(value) is str and value == 'auto' else ''}"
        )

    missing = [key for key in options_of(rules) if key not in options]
    if missing:
        raise ValueError(f"{where}: it has no {missing[0]} any more; a parameter group keeps its options")
    lr = options["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            refuse("lr", "a number, or a tensor of one floating-point number")
        lr = 0.0 if step else float(lr)
    # A schedule may overshoot to below zero.
    want = not_negative(abs(lr) if step and isinstance(lr, (int, float)) and not isinstance(lr, bool) else lr)
    if want:
        refuse("lr", want)
    declared = rules.options
    for key in options_of(rules)[1:]:
        want = _CHECKS[key](options[key]) if key in _CHECKS else declared[key].check(options[key])
        if want:
            refuse(key, want)


_CHECKS = {"weight_decay": not_negative, "maximize": flag, STOCHASTIC_ROUNDING: flag}
