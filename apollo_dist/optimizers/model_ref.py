"""The model's parameters as they are now, which need not be those that the optimizer was built with.

``fully_shard`` puts new parameters into a model. Accelerate does so too, and exchanges them in the optimizer's groups
as well, where nothing says any more which is which. A matrix's projection and its state go by its name, so the names of
the model are laid on the parameters that it has now.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from ..rules.groups import SELECT_BY_NAME
from ..sharding import dtensor, fsdp1
from ..sharding.names import canonical_name
from ..sharding.parameters import ParamInfo, logical_shape
from .parameters import param_info

logger = logging.getLogger("apollo_dist")


class ModelRef:
    """A model held weakly, or none.

    Args:
        model: whose parameters an optimizer trains; None where it is not known.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._given = model
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else None

    def check(self, params: Any) -> None:
        """Note where FSDP1's parameters lie, and drop the strong reference.

        Raises:
            ValueError: if the model is none, or not the one that was passed as ``params``.
        """
        given, self._given = self._given, None
        if given is not None and not isinstance(given, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(given).__name__}")
        if isinstance(params, nn.Module) and given is not params:
            raise ValueError("pass the model once: APOLLO(model, ...), or APOLLO(params, model=model, ...)")
        if given is not None:
            fsdp1.register(given)

    def _parameters(self) -> dict[str, Tensor]:
        """Its parameters by canonical name; empty where there is none, or none any more."""
        model = self.module
        return {} if model is None else {canonical_name(name): p for name, p in model.named_parameters()}

    def named(self, pairs: Sequence[tuple[str | None, Tensor]]) -> list[tuple[str | None, Tensor]]:
        """(name, parameter) pairs, nameless ones named as the model names them."""
        if all(name is not None for name, _ in pairs):
            return list(pairs)
        names = {id(p): name for name, p in self._parameters().items()}
        return [(names.get(id(p)) if name is None else name, p) for name, p in pairs]

    @property
    def module(self) -> nn.Module | None:
        """The model; None where there is none, or none any more."""
        return None if self._model is None else self._model()

    def changes(
        self, held: Sequence[Tensor], members: Mapping[int, ParamInfo], before: Set[int]
    ) -> tuple[list[str], list[str], list[str]]:
        """What became of an optimizer's parameters in the model.

        Args:
            held: the optimizer's parameters.
            members: by ``id``.
            before: ids of all parameters that the model had before.

        Returns:
            Names of held parameters that the model does not have any more under any name; of those for which it has
            another now; and of trainable ones that are new in the model, and not held.
        """
        assert self.module is not None
        now = {canonical_name(name): p for name, p in self.module.named_parameters(remove_duplicate=False)}
        present, ours = set(map(id, now.values())), set(map(id, held))
        gone = [members[id(p)].name for p in held if id(p) not in present]
        # A name that now leads to another parameter of the optimizer is tied to it.
        moved = [name for name in gone if name in now and id(now[name]) not in ours]
        new = [n for n, p in now.items() if p.requires_grad and id(p) not in ours | before and n not in moved]
        return [name for name in gone if name not in now], moved, new

    def follow(
        self, groups: Sequence[dict[str, Any]], members: Mapping[int, ParamInfo], *, strict: bool
    ) -> dict[int, ParamInfo]:
        """Members for the parameters in ``groups``, with the model's names where none were given.

        A parameter that the model does not have any more is exchanged in ``groups``, in place, for the one that now has
        its name.

        Args:
            groups: the optimizer's ``param_groups``; their parameters may have been exchanged already.
            members: those of the optimizer so far, by ``id``.
            strict: refuse parameters without a name that the model does not have either; else they stay as they are.

        Returns:
            The members by ``id``, in the order of ``groups``.

        Raises:
            ValueError: if a parameter cannot be named, or was replaced by one of another shape.
        """
        now = self._parameters()
        names = {id(parameter): name for name, parameter in now.items()}
        found: dict[int, ParamInfo] = {}
        replaced = 0
        for group in groups:
            choose = bool(group.get(SELECT_BY_NAME))
            for i, parameter in enumerate(group["params"]):
                known, name = members.get(id(parameter)), names.get(id(parameter))
                if known is not None and known.named and name is None and known.name in now:
                    group["params"][i] = current = now[known.name]
                    _check_shape(known, current)
                    found[id(current)] = param_info(len(found), known.name, current, choose=choose)
                    replaced += 1
                elif known is not None and (known.named or (name is None and not strict)):
                    found[id(parameter)] = known
                elif name is not None:
                    found[id(parameter)] = param_info(len(found), name, parameter, choose=choose)
                else:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is not one of {type(self.module).__name__}'s, "
                        "so it has no name to draw a projection by. Build the optimizer as APOLLO(model) from the "
                        "model that is trained"
                    )
        lost = {m.name for m in members.values() if m.named} - {m.name for m in found.values()}
        if lost:
            raise ValueError(
                f"{len(lost)} parameters, among them {min(lost)}, were replaced, and {type(self.module).__name__} "
                "knows them under other names than the optimizer was given. Build it as APOLLO(model) from the model "
                "that is trained"
            )
        if replaced:
            logger.info("%d parameters were replaced in the model after the optimizer was built; it follows", replaced)
        return found


def _check_shape(known: ParamInfo, current: Tensor) -> None:
    if logical_shape(current) != known.shape:
        raise ValueError(
            f"{known.name} had shape {known.shape} when the optimizer was built, and the model now has one of shape "
            f"{logical_shape(current)}; build the optimizer anew"
        )


def check_not_replaced(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError if nothing will ever train because ``fully_shard`` came after an optimizer without a model.

    The parameters are then none of any model's and never get a gradient, and a sharded model has as many of each shape.
    """
    if not parameters or any(p.grad is not None or dtensor.is_dtensor(p) for p in parameters):
        return
    gc.collect()  # a model that nobody holds any more may still be known to torch
    shapes = Counter(tuple(p.shape) for p in parameters)
    sharded = any(shapes <= Counter(tuple(p.shape) for p in m.parameters()) for m in dtensor.sharded_modules())
    if sharded and not _in_a_module(parameters):
        raise ValueError(
            f"none of the {len(parameters)} parameters has a gradient or is sharded, but a model in this process is: "
            "fully_shard replaced its parameters after the optimizer was built. Build APOLLO after fully_shard, or as "
            "APOLLO(model), which follows"
        )


def find_model(parameters: Sequence[Tensor]) -> nn.Module | None:
    """The outermost module of this process that has all of some parameters; None if there is none.

    Looks at every object of the process, which takes some tenths of a second in a large one: once, at the first step.
    """
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module) and "_modules" in vars(thing)]
    parents = {id(child): m for m in modules for child in m._modules.values() if child is not None}
    wanted = id(parameters[0]) if parameters else 0
    model = next((m for m in modules if any(id(p) == wanted for p in m._parameters.values())), None)
    seen: set[int] = set()
    while model is not None and id(model) in parents and id(model) not in seen:
        seen.add(id(model))
        model = parents[id(model)]
    if model is None:
        return None
    present = {id(p) for p in model.parameters()}
    return model if all(id(p) in present for p in parameters) else None


def _in_a_module(parameters: Sequence[Tensor]) -> bool:
    """Whether some module has one of the parameters. Looks at every object of the process, so ask this last."""
    wanted = {id(p) for p in parameters}
    modules = (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module))
    return any(id(p) in wanted for module in modules for p in vars(module).get("_parameters", {}).values())
