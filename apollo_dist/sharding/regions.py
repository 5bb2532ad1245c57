"""Tiles: the rectangles of a logical matrix that one rank holds. Integers only.

A flat row-major range [start, stop) of an m x n matrix is at most three tiles::

        . . . . # #     the end of a row        tile 1
        # # # # # #     whole rows              tile 2
        # # # # # #
        # # # . . .     the start of a row      tile 3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

Range = tuple[int, int]


def joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The same indices in the same order, ranges that follow each other made one."""
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows ``row .. row + height`` and columns ``column .. column + width`` of a matrix.

    ``offset`` is where the tile starts in the rank's local flat buffer, and ``stride`` how far apart its rows begin
    there: ``width``, unless the rank's local rows hold other columns as well. 0 means ``width``.
    """

    row: int
    column: int
    height: int
    width: int
    offset: int
    stride: int = 0

    @property
    def numel(self) -> int:
        """How many elements the tile has."""
        return self.height * self.width

    @property
    def strides(self) -> tuple[int, int] | None:
        """How far apart its elements lie in the buffer, down and across; None for row-major order without gaps."""
        return (self.stride, 1) if self.stride else None

    def channels(self, by_rows: bool) -> Range:
        """The tile's half-open range along the channel dimension (rows where rows are the channels, else columns)."""
        return (self.row, self.row + self.height) if by_rows else (self.column, self.column + self.width)

    def inner(self, by_rows: bool) -> Range:
        """The tile's half-open range along the projected dimension."""
        return (self.column, self.column + self.width) if by_rows else (self.row, self.row + self.height)


def flat_tiles(n: int, start: int, stop: int, offset: int = 0) -> tuple[Tile, ...]:
    """The row-major flat range [start, stop) of a matrix with ``n`` columns, as at most three tiles.

    ``offset`` is the position of element ``start`` in the local flat buffer. An empty range gives no tiles.
    """
    assert 0 <= start and n > 0
    if stop <= start:
        return ()
    first_row, first_col = divmod(start, n)
    last_row, last_col = divmod(stop, n)
    if first_row == last_row:
        return (Tile(first_row, first_col, 1, stop - start, offset),)
    tiles = []
    if first_col:
        tiles.append(Tile(first_row, first_col, 1, n - first_col, offset))
        first_row += 1
    if last_row > first_row:
        whole = offset + first_row * n - start
        tiles.append(Tile(first_row, 0, last_row - first_row, n, whole))
    if last_col:
        tiles.append(Tile(last_row, 0, 1, last_col, offset + last_row * n - start))
    return tuple(tiles)


@lru_cache(maxsize=64)
def tiles_in_blocks(tiles: tuple[tuple[Tile, ...], ...], n: int, block: int) -> tuple[tuple[Tile, ...], ...]:
    """For each rank the tiles of a matrix with ``n`` columns, once ``block`` neighbouring rows are made one row.

    That row has ``block * n`` columns, and all elements lie where they did. Tiles of whole rows stay few; one of parts
    of rows becomes a tile for each row of a block.
    """
    return tuple(tuple(one for tile in held for one in _in_blocks(tile, n, block)) for held in tiles)


def _in_blocks(tile: Tile, n: int, block: int) -> tuple[Tile, ...]:
    if tile.width == n:
        return flat_tiles(n * block, tile.row * n, (tile.row + tile.height) * n, tile.offset)
    stride = tile.stride or tile.width
    found = []
    for down in range(min(block, tile.height)):
        row, height = tile.row + down, -(-(tile.height - down) // block)
        column = row % block * n + tile.column
        found.append(Tile(row // block, column, height, tile.width, tile.offset + down * stride, block * stride))
    return tuple(found)


@dataclass(frozen=True)
class Box:
    """A rectangle of a parameter of any number of dimensions: checkpoints are made of them.

    ``offsets`` and ``sizes`` have one entry for each dimension. ``offset`` is where the box starts in the rank's local
    flat buffer, and ``strides`` how far apart its elements lie there along each dimension; without strides they lie in
    row-major order without gaps.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """How many elements the box has."""
        return math.prod(self.sizes)


def flat_boxes(shape: tuple[int, ...], start: int, stop: int, offset: int = 0) -> list[Box]:
    """The row-major flat range [start, stop) of a tensor, as few boxes: one dimension more adds at most two.

    ``offset`` is the position of element ``start`` in the local flat buffer. An empty range gives no boxes.
    """
    assert 0 <= start
    if stop <= start:
        return []
    if not shape:
        return [Box((), (), offset)]
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return _inside(first, flat_boxes(shape[1:], head, tail, offset))
    boxes = []
    if head:
        boxes += _inside(first, flat_boxes(shape[1:], head, inner, offset))
        first += 1
    if last > first:
        rest = (0,) * (len(shape) - 1)
        boxes.append(Box((first, *rest), (last - first, *shape[1:]), offset + first * inner - start))
    if tail:
        boxes += _inside(last, flat_boxes(shape[1:], 0, tail, offset + last * inner - start))
    return boxes


def _inside(index: int, boxes: list[Box]) -> list[Box]:
    """Boxes of the ``index``-th slice along a tensor's first dimension, as boxes of the tensor."""
    return [Box((index, *b.offsets), (1, *b.sizes), b.offset) for b in boxes]


@dataclass(frozen=True)
class FlatPartition:
    """Which row-major flat range of one parameter each rank of a shard group holds.

    ``ranges[k]`` is rank k's half-open range of the parameter's elements; it may be empty.
    """

    ranges: tuple[Range, ...]

    def numel(self, rank: int) -> int:
        """How many elements rank ``rank`` holds."""
        start, stop = self.ranges[rank]
        return max(0, stop - start)

    def signature(self, rank: int) -> list[tuple[int, ...]]:
        """What rank ``rank`` holds, as plain integers: checkpoints compare it."""
        return [self.ranges[rank]]

    def boxes(self, rank: int, shape: tuple[int, ...]) -> list[Box]:
        """What rank ``rank`` holds of the parameter, whose shape is ``shape``, as boxes; offsets as in ``tiles``."""
        return flat_boxes(shape, *self.ranges[rank])

    def tiles(self, index: int, m: int, n: int) -> tuple[tuple[Tile, ...], ...]:
        """For each rank its tiles of the ``index``-th m x n matrix of the parameter (0 for a 2-D parameter).

        Offsets count from the start of the rank's own range. Equal partitions give the same object while it is known,
        so that the layers of a model share it.
        """
        return flat_partition_tiles(self.ranges, index, m, n)


@lru_cache(maxsize=64)
def flat_partition_tiles(ranges: tuple[Range, ...], index: int, m: int, n: int) -> tuple[tuple[Tile, ...], ...]:
    """``FlatPartition(ranges).tiles(index, m, n)``; the last results are kept."""
    base = index * m * n
    result = []
    for start, stop in ranges:
        a, b = max(start, base), min(stop, base + m * n)
        result.append(flat_tiles(n, a - base, b - base, a - start) if a < b else ())
    return tuple(result)


def check_cover(name: str, m: int, n: int, tiles: Sequence[Sequence[Tile]]) -> None:
    """Raise ValueError unless the tiles of all ranks cover the m x n matrix exactly once.

    Sweeps over the bands of rows between tile edges; in every band the tiles must follow each other without gap or
    overlap from column 0 to n.
    """
    flat = [(rank, tile) for rank, held in enumerate(tiles) for tile in held if tile.numel]
    edges = sorted({0, m} | {t.row for _, t in flat} | {t.row + t.height for _, t in flat})
    band_of = {edge: i for i, edge in enumerate(edges)}
    bands: list[list[tuple[int, int, int]]] = [[] for _ in edges]
    for rank, tile in flat:
        for band in range(band_of[tile.row], band_of[tile.row + tile.height]):
            bands[band].append((tile.column, tile.column + tile.width, rank))
    if edges[0] != 0 or edges[-1] != m:
        raise ValueError(f"{name}: tiles reach rows {edges[0]}..{edges[-1]} of a matrix with {m} rows")
    for band in range(len(edges) - 1):
        reached = 0
        for start, stop, rank in sorted(bands[band]):
            if start != reached:
                what = "held twice" if start < reached else "held by no rank"
                raise ValueError(
                    f"{name}: row {edges[band]}, columns {min(start, reached)}..{max(start, reached)} are {what} "
                    f"(seen at rank {rank} of the shard group)"
                )
            reached = stop
        if reached != n:
            raise ValueError(f"{name}: row {edges[band]}, columns {reached}..{n} are held by no rank")


@lru_cache(maxsize=64)
def row_ranges(rows: int, width: int, world: int) -> tuple[Range, ...]:
    """FSDP2's rule, which is ``torch.chunk``'s: runs of ceil(rows / world) rows, the last ones shorter or empty."""
    chunk = -(-rows // world)
    return tuple(pairwise(min(rank * chunk, rows) * width for rank in range(world + 1)))


@lru_cache(maxsize=64)
def even_ranges(numel: int, world: int) -> tuple[Range, ...]:
    """ZeRO-3's rule: each rank holds ceil(numel / world) elements; (0, 0) for one that holds only padding."""
    return cut_ranges(0, numel, -(-numel // world), world)


def cut_ranges(start: int, numel: int, partition: int, world: int) -> tuple[Range, ...]:
    """ZeRO-1's and 2's rule: which elements of a parameter lie in each rank's partition of a flat buffer.

    Args:
        start, numel: where the parameter lies in the buffer.
        partition: elements of one rank.
        world: how many partitions the buffer has.
    """
    result: list[Range] = [(0, 0)] * world
    if not numel:
        return tuple(result)
    for rank in range(start // partition, min(world, -(-(start + numel) // partition))):
        low = max(start, rank * partition) - start
        high = min(start + numel, (rank + 1) * partition) - start
        if low < high:
            result[rank] = (low, high)
    return tuple(result)


def whole_partition(numel: int) -> FlatPartition:
    """One rank holds all ``numel`` elements."""
    return FlatPartition(((0, numel),))
