"""Parameters as they are given: groups, names, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..rules.base import Rules
from ..rules.groups import options_of
from ..rules.registry import RULE, rules_named
from ..selection.choice import check_any, of_model, tell
from ..sharding import fsdp1
from ..sharding.names import canonical_name
from ..sharding.parameters import ParamInfo, logical_shape
from .options import check_known


def param_info(index: int, name: str | None, tensor: torch.Tensor, *, choose: bool = False) -> ParamInfo:
    """What is known of a parameter as it was given.

    Args:
        index: its place among all parameters, which names it where ``name`` is None.
        name: as given, wrapped or not.
        tensor: the parameter.
        choose: whether the library decides if it is low-rank.

    Raises:
        ValueError: for complex or integer parameters, and for those of FSDP1 whose model was never seen.
    """
    named = name is not None
    name = canonical_name(name) if name is not None else f"param_{index}"
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; APOLLO optimizes real floating-point parameters only")
    fsdp1.check(name, tensor)
    return ParamInfo(name, logical_shape(tensor), tensor.dtype, named, choose=choose)


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model that train or may do so later, by canonical name."""
    # One that is frozen has no state until it trains; of integers (quantized) it never does.
    return [
        (canonical_name(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or parameter.is_floating_point()
    ]


def param_groups(
    model: nn.Module, rank: int | None = None, *, rule: str = "apollo", exclude: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups of a model's parameters, with names.

    For APOLLO two: attention and MLP matrices low-rank, everything else AdamW. The choice is that of ``APOLLO(model)``;
    ``apollo_dist.describe(model)`` prints it with the reasons. For any other rule one, which names the rule.

    Args:
        model: the model, wrapped or not. Parameters that are frozen at present are in the groups as well: they have no
            state, and train once they require a gradient.
        rank: r of the low-rank group, by default 256. Matrices with a smaller side go to AdamW, and the log names them.
        rule: the rule's name, such as "scale".
        exclude: a regular expression; matching names go to AdamW. For APOLLO only.
        options: further options of the groups: lr, weight_decay, maximize, and what the rule has (for APOLLO betas and
            eps, and of the low-rank group scale, scale_type, update_proj_gap, proj, proj_type, scale_front,
            disable_nl).

    Returns:
        Groups whose ``params`` are (name, parameter) pairs.

    Raises:
        ValueError: for an unknown option or rule, or if no matrix is found for APOLLO.
    """
    rules = rules_named(rule)
    if rules.matrix is not None and rules.matrix.chosen:
        return chosen_groups(model, rules, 256 if rank is None else rank, exclude, options)
    check_known(options, options_of(rules), "option")
    if rank is not None or exclude is not None:
        raise ValueError(f"rank and exclude are for low-rank matrices, which rule={rule!r} does not have")
    return [{"params": named_parameters(model), RULE: rule, **options}]


def chosen_groups(
    model: nn.Module, rules: Rules, rank: int, exclude: str | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The groups of rules whose matrices are chosen: low-rank ones, and the others; see ``param_groups``."""
    check_known(options, [key for key in options_of(rules) if key != "rank"], "option")
    choice = of_model(model, rank, exclude)
    low: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters(model):
        (low if choice[name].low_rank else rest).append((name, parameter))
    told = {name: choice[name] for name, _ in (*low, *rest)}
    trainable = sum(parameter.requires_grad for _, parameter in (*low, *rest))
    check_any(told, f"{type(model).__name__} with {trainable} trainable parameters", rank)
    tell(told, rank)
    groups: list[dict[str, Any]] = [{"params": low, "rank": rank, **options}]
    if rest:
        shared = options_of(Rules(None, rules.element))
        groups.append({"params": rest, **{key: value for key, value in options.items() if key in shared}})
    return groups


def split_params(params: Any, names: Any = None) -> list[tuple[str | None, torch.Tensor]]:
    """A group's ``params`` (tensors, or (name, tensor) pairs) as pairs; None where there is no name.

    Args:
        params: as given.
        names: the group's ``param_names``, one for each parameter, as torch keeps them; None if there are none.

    Raises:
        ValueError: for anything else, or if the names do not fit.
    """
    if isinstance(params, torch.Tensor):
        params = [params]
    if isinstance(params, (set, frozenset)):
        raise ValueError("parameters must come in an order that is the same on every rank; a set has none")
    pairs: list[tuple[str | None, torch.Tensor]] = []
    for item in params:
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(tensor, torch.Tensor) or not (name is None or isinstance(name, str)):
            raise ValueError(f"parameters must be tensors or (name, tensor) pairs, got {_kind_of(item)}")
        pairs.append((name, tensor))
    if names is None:
        return pairs
    names = list(names)
    if len(names) != len(pairs) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"param_names must be {len(pairs)} names, one for each parameter, got {_short(names)}")
    for (name, tensor), other in zip(pairs, names, strict=True):
        if name not in (None, other):
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is {name!r} in params and {other!r} in param_names; "
                "give one of them"
            )
    return [(name, tensor) for name, (_, tensor) in zip(names, pairs, strict=True)]


def _kind_of(item: Any) -> str:
    return f"({', '.join(type(one).__name__ for one in item)})" if isinstance(item, tuple) else type(item).__name__


def _short(names: list[Any]) -> str:
    return f"{len(names)}: {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}"


def check_named_alike(pairs: Iterable[tuple[str | None, torch.Tensor]], where: str, named: bool | None = None) -> None:
    """Raise ValueError if some parameters have names and others have none.

    A parameter's projection and state go by its name, so a place in a list must not stand in for some of them.

    Args:
        pairs: of one parameter group.
        where: they stand, for the message.
        named: whether those in other groups have names; None if there are none.
    """
    pairs = list(pairs)
    bare = [tensor for name, tensor in pairs if name is None]
    if bare and (named or len(bare) < len(pairs)):
        raise ValueError(
            f"{where}: {len(bare)} of {len(pairs)} parameters, the first of shape {tuple(bare[0].shape)}, came without "
            "a name, and others with one. Pass all of them as (name, parameter) pairs, or none, or the model that has "
            "them (APOLLO(..., model=model))"
        )
    if named is False and pairs and not bare:
        raise ValueError(
            f"{where}: {pairs[0][0]} and {len(pairs) - 1} others have names, and the parameters of earlier groups have "
            "none. Pass all of them as (name, parameter) pairs, or none"
        )
