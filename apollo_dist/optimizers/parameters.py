"""Parameters as users pass them: tensors, pairs with names, models; what is known of each, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import fsdp1, int8
from ..sharding.names import canonical_name
from ..sharding.parameters import ParamInfo, logical_shape


def param_info(index: int, name: str | None, tensor: torch.Tensor, *, choose: bool = False) -> ParamInfo:
    """What is known of a parameter as it was given.

    Args:
        index: its place among all parameters, which names it where ``name`` is None.
        name: as given, wrapped or not.
        tensor: the parameter.
        choose: whether the library decides if it is low-rank.

    Raises:
        ValueError: for complex or integer parameters, for those of FSDP1 whose model was never seen, and for weights of
            torchao that cannot be written.
    """
    named = name is not None
    name = canonical_name(name) if name is not None else f"param_{index}"
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; APOLLO optimizes real floating-point parameters only")
    fsdp1.check(name, tensor)
    int8.check(name, tensor)
    return ParamInfo(name, logical_shape(tensor), tensor.dtype, named, choose=choose)


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model that train or may do so later, by canonical name."""
    # One that is frozen has no state until it trains; of integers (quantized) it never does.
    return [
        (canonical_name(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or parameter.is_floating_point()
    ]


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


def check_no_duplicates(tensors: Iterable[tuple[str, Tensor]], known: Mapping[int, ParamInfo]) -> None:
    """Raise ValueError if a tensor comes twice, or is known already: it would be updated twice in a step."""
    names = {key: m.name for key, m in known.items()}
    for name, tensor in tensors:
        if id(tensor) in names:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is given twice, before as {names[id(tensor)]}: some parameters "
                "appear in more than one parameter group, or twice in one. Pass each once"
            )
        names[id(tensor)] = name
