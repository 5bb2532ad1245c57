"""Parameters that are replaced in a model, and names that only the model knows: an optimizer follows both.

``fully_shard`` puts new parameters in the place of those that an optimizer was built with. Accelerate does the same and
exchanges them in ``param_groups`` too, where nothing says any more which is which. A matrix's projection and its state
go by its name, so here the names of a model are laid on the parameters that it has now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .groups import Member, member
from .layout import dtensor
from .layout.holding import canonical_name


def follow(
    groups: Sequence[dict[str, Any]], members: Mapping[int, Member], model: nn.Module, *, strict: bool
) -> dict[int, Member]:
    """Members for the parameters that ``groups`` hold, with the model's names where none were given.

    A parameter that the model does not have any more is exchanged in ``groups``, in place, for the one that now has its
    name.

    Args:
        groups: the optimizer's ``param_groups``; Accelerate may have exchanged their parameters.
        members: those of the optimizer so far, by ``id``.
        model: whose parameters they are, wrapped or not.
        strict: refuse parameters without a name that the model does not have either; else they stay as they are.

    Returns:
        The members by ``id``, in the order of ``groups``.

    Raises:
        ValueError: if a parameter cannot be named, or was replaced by one of another shape.
    """
    now = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in now.items()}
    found: dict[int, Member] = {}
    for group in groups:
        for i, parameter in enumerate(group["params"]):
            known, name = members.get(id(parameter)), names.get(id(parameter))
            if known is not None and known.named and name is None and known.name in now:
                name, group["params"][i] = known.name, now[known.name]
                _check_shape(known, now[name])
                found[id(now[name])] = member(len(found), name, now[name])
            elif known is not None and (known.named or (name is None and not strict)):
                found[id(parameter)] = known
            elif name is not None:
                found[id(parameter)] = member(len(found), name, parameter)
            else:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one of {type(model).__name__}'s, so it has "
                    "no name to draw a projection by. Build the optimizer as APOLLO(model) from the model that is "
                    "trained"
                )
    lost = {m.name for m in members.values() if m.named} - {m.name for m in found.values()}
    if lost:
        raise ValueError(
            f"{len(lost)} parameters, among them {min(lost)}, were replaced, and {type(model).__name__} knows them "
            "under other names than the optimizer was given. Build it as APOLLO(model) from the model that is trained"
        )
    return found


def _check_shape(known: Member, parameter: Tensor) -> None:
    if tuple(parameter.shape) != known.shape:
        raise ValueError(
            f"{known.name} of shape {known.shape} was replaced in the model by a parameter of shape "
            f"{tuple(parameter.shape)}; build the optimizer after that"
        )


def check_not_replaced(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if nothing will ever train because ``fully_shard`` came after an optimizer without a model.

    The parameters are then none of any model's, and never get a gradient.
    """
    left = all(p.grad is None and not dtensor.is_dtensor(p) for p in parameters)
    if left and dtensor.any_sharded_module():
        raise ValueError(
            f"none of the {len(parameters)} parameters has a gradient or is sharded, but a model in this process is: "
            "fully_shard replaced its parameters after the optimizer was built. Build APOLLO after fully_shard, or as "
            "APOLLO(model), which follows"
        )
