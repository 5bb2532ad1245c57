"""What the two sides of the exchanges hand over: a rank's part of a matrix, what an owner gets of it, its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..sharding.regions import Range


class Projected(NamedTuple):
    """A rank's part of a matrix's low-rank gradient: channels from ``position`` on in what it projects."""

    matrix: int
    position: int
    channels: int
    numbers: int


class Elements(NamedTuple):
    """Gradient elements: channels ``first .. last`` of one of the rank's tiles, counted from the tile's first one.

    They travel row by row, as they lie in the tile.
    """

    matrix: int
    tile: int
    first: int
    last: int
    numbers: int


# What has to be projected and added: channels, ranges of the projected dimension, the gradient of both, channels first.
Operand = tuple[slice, "list[Range]", Tensor]


class Partial(NamedTuple):
    """What a rank has for exchange 1 of one matrix.

    Attributes:
        low_rank: its part of R over ``Channels.projected``, (channels, r).
        norms: its part of the squared channel norms of the gradient over the same, (channels,), where the plan asks
            for them.
        tiles: the gradient of its tiles as they are stored, (height, width) each, in any dtype; None for zeros.
    """

    low_rank: Tensor
    norms: Tensor | None
    tiles: Sequence[Tensor] | None


class Received(NamedTuple):
    """What exchange 1 brings for one matrix, over ``Channels.owned_shared``; channels are given in that set.

    Attributes:
        sums: (channels, the sum of the parts of R, (channels, r), and that of the squared norms, (channels,) or None);
            together all channels.
        elements: what has to be projected and added.
    """

    sums: list[tuple[slice, Tensor, Tensor | None]]
    elements: list[Operand]


class Answer(NamedTuple):
    """What exchange 2 brings for one matrix whose low-rank updates are elements in part.

    Attributes:
        numbers: of the shared channels that this rank multiplies with P, (channels, numbers).
        scales: of all shared channels, (channels, 1), or None.
        elements: the others' low-rank updates: (first channel in ``shared``, tile number, elements, (channels, the
            tile's inner extent)).
    """

    numbers: Tensor
    scales: Tensor | None
    elements: list[tuple[int, int, Tensor]]
