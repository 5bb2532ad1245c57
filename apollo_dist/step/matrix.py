"""One logical matrix as this rank holds it: its tiles, its projection slab, its owned state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..exchange.channels import ChannelSet
from ..exchange.collectives import TERMS, Partial, Received
from ..exchange.plan import MatrixSpec
from ..exchange.routes import Channels
from ..projections.cache import Projection, ProjectionSlice
from ..rules import apollo as rule
from ..sharding.local_shard import Holding, view_of
from ..sharding.regions import Range, Tile

# Columns of a matrix's norm terms: ||N||^2, ||R||^2, and ||G||^2 (tensor) or sum_c s_c^2 ||G_c||^2 (channel).
NORMALIZED, LOW_RANK, GRADIENT = range(TERMS)


def spec_of(name: str, m: int, n: int, group: Mapping[str, Any], tiles: tuple[tuple[Tile, ...], ...]) -> MatrixSpec:
    """What the planner needs to know of an m x n matrix under a parameter group's options."""
    tensor = group["scale_type"] == "tensor"
    limiter = not group["disable_nl"]
    terms = (NORMALIZED, LOW_RANK) if tensor else ()
    return MatrixSpec(
        name=name,
        m=m,
        n=n,
        rank=group["rank"],
        channel_norms=limiter and not tensor,
        channel_scales=not tensor,
        terms=(*terms, GRADIENT) if limiter else terms,
        tiles=tiles,
    )


@dataclass(frozen=True)
class _Pieces:
    """How the local tiles overlap a set of channels.

    ``parts`` lists (tile number, rows of the tile's channels-first view, position in the set), None meaning all of
    them. ``overlapping`` says whether several tiles hold elements of one channel, so that their contributions add up.
    """

    parts: tuple[tuple[int, slice | None, slice | None], ...]
    overlapping: bool

    @staticmethod
    def of(tiles: Sequence[Tile], tall: bool, chosen: ChannelSet) -> _Pieces:
        parts: list[tuple[int, slice | None, slice | None]] = []
        covered = 0
        for number, tile in enumerate(tiles):
            first, last = tile.channels(tall)
            for start, stop, at in chosen.positions(first, last):
                count = stop - start
                rows = None if (start, stop) == (first, last) else slice(start - first, stop - first)
                parts.append((number, rows, None if count == chosen.count else slice(at, at + count)))
                covered += count
        return _Pieces(tuple(parts), covered > chosen.count)


def _take(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class Matrix:
    """The part of one matrix that this rank works on.

    Attributes:
        spec: shape, rank and tiles of all ranks.
        group: the parameter group, whose hyperparameters are read at every step.
        state: ``step`` (int), ``exp_avg`` and ``exp_avg_sq`` (owned channels, r), ``last_norm`` (scalar).
        channels: which channels this rank deals with.
    """

    def __init__(
        self,
        spec: MatrixSpec,
        holding: Holding,
        channels: Channels,
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        self.spec, self.holding, self.channels, self.group, self.state = spec, holding, channels, group, state
        self.tiles = spec.tiles[holding.group.rank]
        self._alone, self._projected, self._held = (
            _Pieces.of(self.tiles, spec.tall, chosen)
            for chosen in (channels.local_only, channels.projected, channels.held)
        )
        self._factory_kwargs: dict[str, Any] = {"dtype": holding.compute_dtype, "device": holding.device}

    @property
    def slab(self) -> ProjectionSlice:
        """What this rank needs of the projection."""
        edges = tuple(tile.inner(self.spec.tall) for tile in self.tiles)
        elements = self.channels.incoming_columns != (0, 0)
        inner = [*edges, self.channels.incoming_columns] if elements else edges
        columns = (min(a for a, _ in inner), max(b for _, b in inner)) if inner else (0, 0)
        needed = bool(self._projected.parts), bool(self._alone.parts) or elements
        return ProjectionSlice(self.spec.name, self.spec.rank, self.holding.compute_dtype, columns, edges, needed)

    @property
    def refresh(self) -> int:
        """How often the projection was redrawn before the current step, of those that ``begin_step`` counted."""
        refresh: int = (self.state["step"] - 1) // self.group["update_proj_gap"]
        return refresh

    def gradients(self) -> list[Tensor]:
        """The gradient of each tile, channels first, in the compute dtype.

        Each is (channels of the tile, its inner extent): a tile of a wide matrix comes transposed. Low-precision
        gradients are converted anew in each phase, so that never more than one batch is kept in float32.
        """
        return [_cast(view, self.holding.compute_dtype) for view in self._stored_gradients()]

    def _stored_gradients(self) -> list[Tensor]:
        grad = self.holding.grad()
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"{self.spec.name} has a sparse gradient, which APOLLO does not support")
        return self._split(grad)[0]

    def _split(self, local: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Views of the tiles in a local tensor, channels first; and the flat copy they are of, if it took one."""
        tall, tiles = self.spec.tall, self.tiles
        if len(tiles) == 1 and local.shape == (tiles[0].height, tiles[0].width):
            return [local if tall else local.t()], None
        flat = local.reshape(-1)
        views = []
        for tile in tiles:
            strides = (tile.stride, 1) if tile.stride else None
            view = view_of(flat, tile.offset, (tile.height, tile.width), strides)
            views.append(view if tall else view.t())
        return views, None if local.is_contiguous() else flat

    def begin_step(self) -> bool:
        """Count the step if there is a gradient; without one this rank leaves the matrix alone."""
        if self.holding.grad() is None:
            return False
        self.state["step"] += 1
        return True

    def partial(self, projection: Projection | None, active: bool) -> Partial:
        """What exchange 1 takes from this rank: its part of R and of the squared norms, and gradient elements.

        Sizes depend on the plan alone: without a gradient (``active`` False) the parts are zeros.

        Args:
            projection: of the current step; None if there is nothing to project, or no gradient.
            active: whether there is a gradient.
        """
        count = self.channels.projected.count
        low_rank = torch.zeros((count, self.spec.rank), **self._factory_kwargs)
        norms = torch.zeros(count, **self._factory_kwargs) if self.spec.channel_norms else None
        if not active or not self.channels.shared.count:
            return Partial(low_rank, norms, None)
        stored = self._stored_gradients()
        if count:
            grads = [_cast(view, self.holding.compute_dtype) for view in stored]
            self._project(grads, self._projected, projection, low_rank)
            if norms is not None:
                self._channel_norms(grads, self._projected, norms)
                norms.square_()
        return Partial(low_rank, norms, stored if self.spec.tall else [view.t() for view in stored])

    def complete(
        self,
        grads: Sequence[Tensor],
        low_rank: Tensor,
        norms: Tensor | None,
        projection: Projection | None,
        received: Received | None,
    ) -> None:
        """Write R, and the gradient's norms, over the owned channels: held alone first, then received ones.

        Args:
            grads: what ``gradients`` returned.
            low_rank: (owned channels, r), written.
            norms: (owned channels,), written; None where norms by channel are not needed.
            projection: of the current step; None if there is nothing to project.
            received: what exchange 1 brought for ``owned_shared``, if there was one.
        """
        alone = self.channels.local_only.count
        if alone:
            first = None if alone == low_rank.shape[0] else slice(alone)
            self._project(grads, self._alone, projection, _take(low_rank, first))
            if norms is not None:
                self._channel_norms(grads, self._alone, _take(norms, first))
        if received is not None and self.channels.owned_shared.count:
            low_rank[alone:] = received.low_rank
            squares = None if norms is None or received.norms is None else received.norms.to(norms.dtype)
            for channels, inner, elements in received.elements:
                part = elements.to(self.holding.compute_dtype)
                low_rank[alone:][channels].addmm_(part, self._columns(projection, inner))
                if squares is not None:
                    lengths = torch.empty_like(squares[channels])
                    rule.channel_norms(part, lengths)
                    squares[channels].addcmul_(lengths, lengths)
            if norms is not None and squares is not None:
                torch.sqrt(squares, out=norms[alone:])
        if self.group["maximize"]:
            low_rank.neg_()

    def shared_scale(self, owned: Tensor | None) -> Tensor | None:
        """What exchange 2 carries: the scaling factors over ``owned_shared``, (channels,)."""
        return None if owned is None else owned[self.channels.local_only.count :, 0]

    def _project(self, grads: Sequence[Tensor], pieces: _Pieces, projection: Projection | None, out: Tensor) -> None:
        """Write this rank's part of R over a set of channels to ``out``, (channels, r).

        R = G P^T for a tall matrix; for a wide one R^T = (P G)^T = G^T P^T, stored channels first alike. Each tile
        needs only the columns of P that it spans.
        """
        if not pieces.parts:
            return
        assert projection is not None
        if pieces.overlapping:
            out.zero_()
        for number, rows, position in pieces.parts:
            part, target = _take(grads[number], rows), _take(out, position)
            if pieces.overlapping:
                target.addmm_(part, projection.tiles[number][:, : self.spec.rank])
            else:
                rule.project(part, projection.tiles[number], target)

    def _channel_norms(self, grads: Sequence[Tensor], pieces: _Pieces, out: Tensor) -> None:
        """Write the norm of this rank's part of each channel's gradient over a set of channels, (channels,)."""
        if not pieces.overlapping:
            for number, rows, position in pieces.parts:
                rule.channel_norms(_take(grads[number], rows), _take(out, position))
            return
        out.zero_()
        for number, rows, position in pieces.parts:
            part, total = _take(grads[number], rows), _take(out, position)
            norms = torch.empty_like(total)
            rule.channel_norms(part, norms)
            total.addcmul_(norms, norms)
        out.sqrt_()

    def _columns(self, projection: Projection | None, inner: Sequence[Range]) -> Tensor:
        """P^T of some ranges of the projected dimension, (their lengths, r), for elements of other ranks."""
        assert projection is not None
        first, slab = projection.first, projection.slab[:, : self.spec.rank]
        parts = [slab[a - first : b - first] for a, b in ChannelSet.merged(inner).ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def held_scale(self, owned: Tensor | None, received: Tensor | None) -> Tensor:
        """The scaling factors of the held channels, (channels, 1): this rank's own, then those of exchange 2, if any.

        Args:
            owned: what ``Batch.owner_step`` returned; not None, for this is with channel scaling.
            received: (channels,).
        """
        assert owned is not None
        if received is None:
            return owned
        alone = owned[: self.channels.local_only.count]
        return torch.cat([alone, received.to(owned.dtype)[:, None]]) if received.numel() else alone

    def apply(self, grads: Sequence[Tensor], factor: Tensor) -> None:
        """Update the local weights.

        Args:
            grads: what ``gradients`` returned.
            factor: of the gradient: the scaling factors of the held channels times the limiter's, (channels, 1), or
                for the whole tensor, a scalar.
        """
        group = self.group
        # Of the negated gradient R is made in ``complete``; norms do not differ.
        sign = 1.0 if group["maximize"] else -1.0
        size = rule.step_size(group["lr"], self.state["step"], group["betas"], factor)
        value = sign * group["scale"] ** 0.5
        if isinstance(size, Tensor):
            factor = factor * size
        else:
            value *= size
        stored = self.holding.weight()
        weights, copied = self._split(stored)
        work = [_cast(weight, self.holding.compute_dtype) for weight in weights]
        for number, rows, position in self._held.parts:
            by = factor if factor.ndim == 0 else _take(factor, position)
            _take(work[number], rows).addcmul_(_take(grads[number], rows), by, value=value)
        rule.decay(work, group["lr"], group["weight_decay"])
        for weight, updated in zip(weights, work, strict=True):
            if updated is not weight:
                weight.copy_(updated)
        if copied is not None:
            stored.copy_(copied.view(stored.shape))
