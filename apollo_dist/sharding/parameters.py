"""Parameters as an optimizer is given them: names and logical shapes, however they are sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Logical shapes of parameters that know neither their own nor who does.
_shapes: Any = WeakIdKeyDictionary()


@dataclass(frozen=True)
class ParamInfo:
    """A parameter as it was given: canonical name (``param_3`` where none was), logical shape, dtype, whether named.

    Members with the same ``part`` step together: their matrices share a plan and its collectives. ``choose`` says
    that their group has no rank of its own, so the library decides whether they are low-rank.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    named: bool
    part: int = 0
    choose: bool = False


def note_shape(parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Note the logical shape of a parameter that an engine flattened, for ``logical_shape``."""
    _shapes[parameter] = shape


def logical_shape(tensor: Tensor) -> tuple[int, ...]:
    """The unsharded shape of a parameter: its own, ZeRO-3's ``ds_shape``, or what ``note_shape`` was told."""
    shape = getattr(tensor, "ds_shape", None) or _shapes.get(tensor)
    return tuple(tensor.shape if shape is None else shape)
