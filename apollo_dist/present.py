"""The model's parameters as they are now, which need not be those that the optimizer was built with.

``fully_shard`` puts new parameters into a model, and tools around it (Accelerate) put them into optimizers, too.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .groups import Member
from .layout import fsdp1
from .layout.detect import logical_shape
from .layout.holding import canonical_name

logger = logging.getLogger("apollo_dist")


class PresentModel:
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
        model = None if self._model is None else self._model()
        return {} if model is None else {canonical_name(name): p for name, p in model.named_parameters()}

    def named(self, pairs: Sequence[tuple[str | None, Tensor]]) -> list[tuple[str | None, Tensor]]:
        """(name, parameter) pairs, nameless ones named as the model names them."""
        if all(name is not None for name, _ in pairs):
            return list(pairs)
        names = {id(p): name for name, p in self._parameters().items()}
        return [(names.get(id(p)) if name is None else name, p) for name, p in pairs]

    def follow(self, groups: Sequence[dict[str, Any]], members: dict[int, Member]) -> bool:
        """Put the model's present parameters into ``groups`` and ``members`` for those that it had; whether any did.

        Args:
            groups: the optimizer's; ``params`` of each are changed in place.
            members: of the optimizer, by ``id``; those of present parameters are added.

        Raises:
            ValueError: if a parameter of the same name has another shape.
        """
        present = self._parameters()
        names = {id(p): name for name, p in present.items()}
        by_name = {m.name: m for m in members.values() if m.named}
        changed = 0
        for group in groups:
            for i, tensor in enumerate(group["params"]):
                known = members.get(id(tensor))
                name = names.get(id(tensor)) if known is None else known.name if known.named else None
                current = present.get(name) if name is not None else None
                if current is None or name not in by_name or (current is tensor and known is not None):
                    continue
                if logical_shape(current) != by_name[name].shape:
                    raise ValueError(
                        f"{name} had shape {by_name[name].shape} when the optimizer was built, and the model now has "
                        f"one of shape {logical_shape(current)}; build the optimizer anew"
                    )
                group["params"][i] = current
                members[id(current)] = dataclasses.replace(by_name[name], dtype=current.dtype)
                changed += 1
        if changed:
            logger.info("%d parameters were replaced in the model after the optimizer was built; it follows", changed)
        return bool(changed)
