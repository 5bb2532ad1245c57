"""One logical matrix as this rank holds it: its tiles, its gradient, what it needs of the projection, its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..projections.slices import Projection, ProjectionSlice, scale_of
from ..rules.base import NO_CARRIER
from ..sharding.local_shard import LocalShard, view_of
from ..state.slots import PROJECTION

if TYPE_CHECKING:
    from ..exchange.channels import ChannelSet
    from ..exchange.plan import MatrixSpec
    from ..exchange.routes import Channels
    from ..kernels.table import Kernels
    from ..rules.base import MatrixRule, Spec
    from ..sharding.regions import Tile
    from .specs import Place


@dataclass(frozen=True)
class Pieces:
    """How the local tiles overlap a set of channels.

    ``parts`` lists (tile number, rows of the tile's channels-first view, position in the set), None meaning all of
    them. ``overlapping`` says whether several tiles hold elements of one channel, so that their contributions add up.
    """

    parts: tuple[tuple[int, slice | None, slice | None], ...]
    overlapping: bool

    @staticmethod
    def of(tiles: Sequence[Tile], by_rows: bool, chosen: ChannelSet) -> Pieces:
        """The pieces of ``tiles`` in the channels ``chosen``."""
        parts: list[tuple[int, slice | None, slice | None]] = []
        covered = 0
        for number, tile in enumerate(tiles):
            first, last = tile.channels(by_rows)
            for start, stop, at in chosen.positions(first, last):
                count = stop - start
                rows = None if (start, stop) == (first, last) else slice(start - first, stop - first)
                parts.append((number, rows, None if count == chosen.count else slice(at, at + count)))
                covered += count
        return Pieces(tuple(parts), covered > chosen.count)


def take(tensor: Tensor, rows: slice | None) -> Tensor:
    """``tensor[rows]``; all of it for None."""
    return tensor if rows is None else tensor[rows]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; itself if it has that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class Matrix:
    """The part of one matrix that this rank works on.

    Attributes:
        place: where it is in its parameter.
        spec: shape and tiles of all ranks, and what is exchanged.
        declared: what the rule declares.
        rule: the rule that updates it.
        group: the parameter group, whose hyperparameters are read at every step.
        state: ``step`` (int), and by the rule's names (owned channels, width), scalars, and (local elements,) in the
            order of the local weights.
        kernels: what a step of it computes with.
        channels: which channels this rank deals with.
        local_only, projected, held, shared: the pieces of ``channels.local_only``, ``.projected``, ``.held`` and
            ``.shared``.
    """

    def __init__(
        self,
        place: Place,
        spec: MatrixSpec,
        declared: Spec,
        rule: MatrixRule,
        shard: LocalShard,
        channels: Channels,
        group: Mapping[str, Any],
        state: dict[str, Any],
        kernels: Kernels,
    ) -> None:
        self.place, self.kernels = place, kernels
        self.spec, self.declared, self.rule, self.shard = spec, declared, rule, shard
        self.channels, self.group, self.state = channels, group, state
        self.tiles = spec.tiles[shard.group.rank]
        # Where the matrix begins in the local weights: those of one matrix lie together.
        self._first = min((tile.offset for tile in self.tiles), default=0)
        self.local_only, self.projected, self.held, self.shared = (
            Pieces.of(self.tiles, spec.by_rows, chosen)
            for chosen in (channels.local_only, channels.projected, channels.held, channels.shared)
        )
        self.factory_kwargs: dict[str, Any] = {"dtype": shard.compute_dtype, "device": shard.device}

    @property
    def projection_slice(self) -> ProjectionSlice:
        """What this rank needs of the projection."""
        edges = tuple(tile.inner(self.spec.by_rows) for tile in self.tiles)
        elements = self.channels.incoming_columns != (0, 0)
        inner = [*edges, self.channels.incoming_columns] if elements else edges
        columns = (min(a for a, _ in inner), max(b for _, b in inner)) if inner else (0, 0)
        gram = self.declared.reduce.gram and self.channels.owned.count > 0
        if gram:
            columns = (0, self.spec.n if self.spec.by_rows else self.spec.m)
        multiplies = self.channels.multiplied is None or bool(self.channels.multiplied)
        updates = bool(self.spec.low_rank_update and self.held.parts and multiplies)
        needed = bool(self.projected.parts), bool(self.local_only.parts) or elements or gram, updates
        if not self.spec.rank or self.spec.shared_state:
            needed = False, False, False
        kind, dtype = self.declared.reduce.projection, self.kernels.entries or self.shard.compute_dtype
        return ProjectionSlice(self.spec.name, self.spec.rank, dtype, columns, edges, needed, kind, self.kernels)

    @property
    def low_rank_columns(self) -> slice:
        """Where among the numbers that travel back of a channel its low-rank update is."""
        first = int(self.spec.channel_scales)
        return slice(first, first + self.spec.low_rank_update * self.spec.rank)

    @property
    def refresh(self) -> int:
        """How often the projection was redrawn before the current step, of those that ``begin_step`` counted."""
        if not self.spec.rank:
            return 0
        refresh: int = (self.state["step"] - 1) // self.group["update_proj_gap"]
        return refresh

    def begin_step(self) -> bool:
        """Count the step if there is a gradient; without one this rank leaves the matrix alone."""
        if self.shard.grad() is None:
            if self.spec.shared_state and not self.numel:
                self.state["step"] += 1  # with those that hold it, as all have to know when its projection is due
            return False
        self.state["step"] += 1
        return True

    def element_step(self) -> None:
        """Let the rule update its state by element."""
        names = self.declared.state.element
        state = {name: self.tile_views(self.state[name]) for name in names}
        for i, grad in enumerate(self.gradients() if names else ()):
            self.rule.element_step(grad, {name: views[i] for name, views in state.items()}, self.group)

    def sources(self) -> list[Tensor]:
        """X of each tile, channels first, of a matrix that its owner needs whole."""
        state = {name: self.tile_views(self.state[name]) for name in self.declared.state.element}
        return [
            self.rule.source(grad, {name: views[i] for name, views in state.items()}, self.group)
            for i, grad in enumerate(self.gradients())
        ]

    @property
    def projection_scale(self) -> float:
        """The factor that P is kept without: 1/sqrt(r) of random projections, 1 of those that are state."""
        return 1.0 if self.spec.shared_state else scale_of(self.spec.rank)

    def stored_projection(self) -> Projection:
        """The projection that is kept as state, in the compute dtype, as ``ProjectionCache`` has others."""
        slab = cast(self.state[PROJECTION], self.shard.compute_dtype)
        edges = (tile.inner(self.spec.by_rows) for tile in self.tiles)
        return Projection(slab, 0, [slab[a:b] for a, b in edges], self.spec.rank, self.projection_scale)

    @property
    def numel(self) -> int:
        """How many elements of the matrix this rank holds."""
        return sum(tile.numel for tile in self.tiles)

    @property
    def pieces(self) -> list[tuple[Tile, int]]:
        """The local tiles of the m x n matrix, and where each begins in a state by element."""
        place = self.place
        tiles = self.shard.partition.tiles(place.index, place.m, place.n)[self.shard.group.rank]
        return [(tile, tile.offset - self._first) for tile in tiles]

    def tile_views(self, flat: Tensor) -> list[Tensor]:
        """A state by element, (local elements,), as one view for each tile, channels first."""
        views = []
        for tile in self.tiles:
            view = view_of(flat, tile.offset - self._first, (tile.height, tile.width), tile.strides)
            views.append(view if self.spec.by_rows else view.t())
        return views

    def carriers(self) -> list[Tensor]:
        """X of each tile, channels first, in a dtype that its kernels take; nothing where there is no X."""
        carrier = self.declared.carrier
        if carrier == NO_CARRIER:
            return []
        tiles = self.stored_gradients() if carrier is None else self.tile_views(self.state[carrier])
        return [self.taken(tile) for tile in tiles]

    def taken(self, tile: Tensor) -> Tensor:
        """A tile in a dtype that the kernels take: as it is stored, or in the compute dtype."""
        return tile if tile.dtype in self.kernels.stored else cast(tile, self.shard.compute_dtype)

    @property
    def reduces_carrier(self) -> bool:
        """Whether what is reduced is the carrier, or both are the gradient."""
        return self.declared.carrier is None or self.declared.reduce.of_carrier

    def reduced(self) -> list[Tensor]:
        """What is reduced of each tile: X or the gradient, channels first, in the dtype that it is stored in."""
        carrier = self.declared.carrier if self.declared.reduce.of_carrier else None
        return self.stored_gradients() if carrier is None else self.tile_views(self.state[carrier])

    def gradients(self) -> list[Tensor]:
        """The gradient of each tile, channels first, in the compute dtype.

        Each is (channels of the tile, its inner extent): a tile whose channels are columns comes transposed.
        Low-precision gradients are converted anew in each phase, so that never more than one batch is kept in float32.
        """
        return [cast(view, self.shard.compute_dtype) for view in self.stored_gradients()]

    def stored_gradients(self) -> list[Tensor]:
        """The gradient of each tile, channels first, in the dtype that it is stored in."""
        grad = self.shard.grad()
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"{self.spec.name} has a sparse gradient, which is not supported")
        return self.split(grad)[0]

    def split(self, local: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Views of the tiles in a local tensor, channels first; and the flat copy they are of, if it took one."""
        by_rows, tiles = self.spec.by_rows, self.tiles
        if len(tiles) == 1 and local.shape == (tiles[0].height, tiles[0].width):
            return [local if by_rows else local.t()], None
        flat = local.reshape(-1)
        views = []
        for tile in tiles:
            view = view_of(flat, tile.offset, (tile.height, tile.width), tile.strides)
            views.append(view if by_rows else view.t())
        return views, None if local.is_contiguous() else flat
