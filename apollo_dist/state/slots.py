"""Slots: the state that one rank keeps of one matrix or tensor, as a dictionary of plain values and tensors.

Keys of a slot::

    step                    steps taken, an int: the step reads it in Python
    what the rule declares  of a matrix (owned channels, width), and (); of another tensor (elements held here,)
    projection              P^T, (min(m, n), r), of a matrix whose projection does not follow from the seed
    held                    which channels or elements these are, as plain integers
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Slot = dict[str, Any]
_NOTHING: Mapping[str, Any] = MappingProxyType({})

STEP, HELD, PROJECTION = "step", "held", "projection"


def ready(
    slot: Slot,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    factory_kwargs: dict[str, Any],
    held: list[Any],
    dtypes: Mapping[str, torch.dtype] = _NOTHING,
    replaced: Collection[str] = (),
) -> None:
    """Fill an empty slot with zeros; check one that was loaded, or that another layout left.

    Args:
        slot: filled or converted in place.
        name: of the matrix or tensor, for the error.
        shapes: of its tensors, by key.
        factory_kwargs: dtype and device of its tensors.
        held: what this rank holds, as plain integers.
        dtypes: of tensors that have another dtype, by key.
        replaced: keys of tensors in whose place the caller puts copies. Zeros of them take no memory.

    Raises:
        ValueError: if the slot is for something else than this rank holds.
    """

    def kwargs(key: str) -> dict[str, Any]:
        return {**factory_kwargs, "dtype": dtypes.get(key, factory_kwargs["dtype"])}

    if not slot:
        slot[STEP] = 0
        for key, shape in shapes.items():
            slot[key] = torch.zeros(() if key in replaced else shape, **kwargs(key)).expand(shape)
        slot[HELD] = held
        return
    if slot[HELD] != held or any(tuple(slot[key].shape) != shape for key, shape in shapes.items()):
        raise ValueError(
            f"the state of {name} is for {slot[HELD]}, but this rank now holds {held}: state_dict loads only "
            "under the world size and layout that wrote it"
        )
    slot.update({key: slot[key].to(**kwargs(key)) for key in shapes})


def copied(value: Any) -> Any:
    """A copy of a state that shares no memory with it, and holds no more than its own elements."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {key: copied(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def step_tensor(step: Any) -> Tensor:
    """A count of steps as torch's optimizers show it: float32, (), on the CPU."""
    return torch.tensor(float(step), dtype=torch.float32)
