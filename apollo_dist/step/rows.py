"""Updates of weights that are stored by rows in INT8: some rows at a time, in floating point, then stored again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..distributed import world_of
from ..kernels.parts import ApplyPart, RowsPart
from ..state.slots import STEP

if TYPE_CHECKING:
    from ..sharding.local_shard import LocalShard
    from .low_rank import LowRankUpdate
    from .matrix import Matrix


class Piece(NamedTuple):
    """Where a window of rows and the held channels of a matrix meet.

    Attributes:
        weight: (channels, inner extent) in the compute dtype, a view of the window.
        channels: which of the tile's channels these are.
        position: the same among the held channels.
        inner: which of the tile's inner extent the window has.
    """

    weight: Tensor
    channels: slice
    position: slice
    inner: slice


def check(m: Matrix) -> None:
    """Raise ValueError if a matrix that is stored by rows cannot be updated by windows of them."""
    rows = m.shard.rows
    assert rows is not None
    if m.tiles and (len(m.tiles) > 1 or m.tiles[0].width % rows.shape[1]):
        raise ValueError(
            f"{m.spec.name} is INT8, and its {m.rule.name} rule has statistics of several rows, which ranks divide "
            "among themselves: shard it so that each rank has all rows of one, or leave the matrix in bf16"
        )


def windows(m: Matrix) -> Iterator[list[Piece]]:
    """The local weights of a matrix, some rows at a time, as views that are stored when the loop goes on."""
    rows = m.shard.rows
    assert rows is not None
    if not m.tiles:
        return
    tile, by_rows = m.tiles[0], m.spec.by_rows
    block = tile.width // rows.shape[1]  # of rows that are one row of the tile
    for stored, values in rows.windows(m.state[STEP], m.shard.compute_dtype, block):
        a, b = stored.start // block, stored.stop // block
        window = values.view(b - a, tile.width)
        found = []
        for _, chosen, position in m.held.parts:
            first, last = (0, tile.height if by_rows else tile.width) if chosen is None else (chosen.start, chosen.stop)
            at = 0 if position is None else position.start
            low, high = (max(first, a), min(last, b)) if by_rows else (first, last)
            if low < high:
                weight = window[low - a : high - a] if by_rows else window.t()[low:high]
                inner = slice(0, tile.width) if by_rows else slice(a, b)
                where = slice(at + low - first, at + high - first)
                found.append(Piece(weight, slice(low, high), where, inner))
        yield found


def update_rows(
    matrices: Sequence[Matrix],
    coefficients: Tensor,
    carriers: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor | None],
    product: LowRankUpdate | None,
) -> None:
    """Update the local weights of matrices that are stored by rows.

    All of them in one go where there is a kernel; else some rows at a time, in floating point.

    Args:
        matrices: the matrices, of one batch.
        coefficients, carriers, scales, product: of them, as ``step.apply.Updates`` has them.
    """
    first = matrices[0]
    kernel, rule = first.kernels.apply_rows, first.rule
    given = list(zip(matrices, carriers, scales, strict=True))
    if kernel is None or product is not None:
        for k, (m, tiles, scale) in enumerate(given):
            _update_windows(m, coefficients[k : k + 1], tiles, scale, product)
        return
    parts = [_part(m, tiles[0], scale, k) for k, (m, tiles, scale) in enumerate(given) if tiles]
    decays = rule.weight_decay(first.group) != 0.0
    kernel(parts, coefficients, decay_first=rule.decay_first, decays=decays)


def _part(m: Matrix, carrier: Tensor, scale: Tensor | None, number: int) -> RowsPart:
    """A matrix as the kernel takes it.

    Args:
        m: the matrix.
        carrier: X of its only tile, channels first.
        scale: scaling factors of the held channels, (channels, 1), or None.
        number: of the matrix among those of the coefficients.
    """
    rows = m.shard.rows
    assert rows is not None
    codes, scales = rows.stored()
    count, columns = rows.shape
    by_rows = m.spec.by_rows
    # The channels of one tile are held in its order.
    factors = None if scale is None else scale[:, 0].contiguous()
    block = m.tiles[0].width // columns if by_rows else 0
    grad = carrier.reshape(count, columns) if by_rows else carrier.t()
    return RowsPart(codes, scales, grad, factors, block, number, rows.rounding(m.state[STEP]))


def _update_windows(
    m: Matrix,
    coefficients: Tensor,
    carriers: Sequence[Tensor],
    scale: Tensor | None,
    product: LowRankUpdate | None,
) -> None:
    """Update the local weights of one matrix: as ``step.apply`` does, window by window.

    Args:
        m: the matrix.
        coefficients: (1, 2), what X times scaling factors, and old weights are multiplied by.
        carriers: X of the tile, channels first; empty where there is none.
        scale: scaling factors of the held channels, (channels, 1), or None.
        product: the step size times its low-rank update, or None.
    """
    decays = m.rule.weight_decay(m.group) != 0.0
    first = m.rule.decay_first
    for pieces in windows(m):
        if product is not None and not first:
            _add_product(pieces, product)
        if carriers:
            parts = [
                ApplyPart(
                    piece.weight,
                    carriers[0][piece.channels, piece.inner],
                    None if scale is None else scale[piece.position, 0],
                    0,
                )
                for piece in pieces
            ]
            m.kernels.apply(parts, coefficients, decay_first=first, decays=decays)
        elif decays:
            for piece in pieces:
                piece.weight.mul_(coefficients[0, 1])
        if product is not None and first:
            _add_product(pieces, product)


def _add_product(pieces: Sequence[Piece], product: LowRankUpdate) -> None:
    for piece in pieces:
        product.add(0, piece.position, piece.weight, piece.inner)


def flat_windows(shard: LocalShard, step: int) -> Iterator[tuple[slice, Tensor]]:
    """The local weights of a parameter that an element rule updates, some rows at a time, each as one flat tensor.

    Args:
        shard: of a parameter that is stored by rows.
        step: the number of the step.

    Yields:
        Which of the local elements, and their weights, (elements,), stored when the loop goes on.
    """
    rows = shard.rows
    assert rows is not None
    columns = rows.shape[1]
    for here, values in rows.windows(step, shard.compute_dtype):
        yield slice(here.start * columns, here.stop * columns), values.view(-1)


def seeded(shard: LocalShard, seed: int) -> LocalShard:
    """A shard whose INT8 weights are rounded with the random bits of ``seed``; any other shard itself."""
    return shard if shard.rows is None else replace(shard, rows=replace(shard.rows, seed=seed))


def checksums(shards: Iterable[LocalShard]) -> dict[str, object]:
    """What replicas of INT8 weights must have in common, by name; the host waits for it.

    DistributedDataParallel cannot broadcast such weights when it is built, so nothing else makes them the same.
    """
    if world_of() == 1:
        return {}
    whole = [shard for shard in shards if shard.rows is not None and shard.layout == "whole"]
    return {f"INT8 weights of {shard.name}": shard.rows.checksum() for shard in whole if shard.rows is not None}
