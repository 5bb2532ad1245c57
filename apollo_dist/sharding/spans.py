"""Where the local elements of a parameter, of any number of dimensions, lie in the whole: as few rectangles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .local_shard import view_of

if TYPE_CHECKING:
    from .regions import Box


class Span(NamedTuple):
    """A rectangle of indices, whose rows lie in one piece here and in the whole.

    Attributes:
        first: the index of its first element in the whole parameter, row by row.
        rows, columns: of the rectangle.
        stride: how much larger the index of the next row is.
        offset: where it begins in the local flat buffer.
        step: how far apart its rows begin there.
    """

    first: int
    rows: int
    columns: int
    stride: int
    offset: int
    step: int

    def view(self, flat: Tensor) -> Tensor:
        """Its elements of a local flat tensor, (rows, columns)."""
        return view_of(flat, self.offset, (self.rows, self.columns), (self.step, 1))


def spans_of(boxes: Sequence[Box], shape: Sequence[int]) -> list[Span]:
    """The local elements that some boxes of a parameter of that shape are."""
    return [span for box in boxes for span in _of_box(box, shape)]


def _of_box(box: Box, shape: Sequence[int]) -> list[Span]:
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    local = box.strides or [math.prod(box.sizes[d + 1 :]) for d in range(len(shape))]
    # (size, stride in the whole, stride here), the last dimension first; those that follow without a gap are one.
    merged: list[tuple[int, int, int]] = []
    for size, whole, here in reversed(list(zip(box.sizes, strides, local, strict=True))):
        inner = merged[-1] if merged else None
        if size == 1:
            continue
        if inner is not None and (whole, here) == (inner[0] * inner[1], inner[0] * inner[2]):
            merged[-1] = (inner[0] * size, inner[1], inner[2])
        else:
            merged.append((size, whole, here))
    if not merged or merged[0][1:] != (1, 1):
        merged.insert(0, (1, 1, 1))
    (columns, _, _), *outer = merged
    rows, stride, step = outer[0] if outer else (1, columns, columns)
    begin = sum(offset * whole for offset, whole in zip(box.offsets, strides, strict=True))
    return [
        Span(
            begin + sum(i * whole for i, (_, whole, _) in zip(place, outer[1:], strict=True)),
            rows,
            columns,
            stride,
            box.offset + sum(i * here for i, (_, _, here) in zip(place, outer[1:], strict=True)),
            step,
        )
        for place in product(*(range(size) for size, _, _ in outer[1:]))
    ]
