"""Blocks of rows as rows of a wider matrix: every element is where it was, whoever holds it."""

from __future__ import annotations

import math

import pytest
import torch

from apollo_dist.sharding.grid import GridPartition
from apollo_dist.sharding.local_shard import view_of
from apollo_dist.sharding.regions import FlatPartition, check_cover, tiles_in_blocks

M, N = 12, 5
PARTITIONS = {
    "flat, cut inside of rows and blocks": FlatPartition(((0, 7), (7, 7), (7, 31), (31, 60))),
    "rows": FlatPartition(((0, 25), (25, 45), (45, 60))),
    "columns": GridPartition(((((0, 12),), ((0, 2),)), (((0, 12),), ((2, 5),)))),
    "strided rows": GridPartition(((((0, 2), (6, 8)), ((0, 5),)), (((2, 6), (8, 12)), ((0, 5),)))),
    "rows and columns": GridPartition(
        (
            (((0, 7),), ((0, 1), (3, 5))), (((0, 7),), ((1, 3),)),
            (((7, 12),), ((0, 1), (3, 5))), (((7, 12),), ((1, 3),)),
        )
    ),
}  # fmt: skip


def local(partition, rank, whole):
    """What a rank stores: its boxes of the whole."""
    flat = torch.empty(partition.numel(rank), dtype=whole.dtype)
    for box in partition.boxes(rank, tuple(whole.shape)):
        window = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
        view_of(flat, box.offset, box.sizes, box.strides).copy_(whole[window])
    return flat


@pytest.mark.parametrize("block", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("name", PARTITIONS)
def test_elements_stay_where_they_are(name, block):
    partition = PARTITIONS[name]
    whole = torch.arange(M * N).view(M, N)
    wide = whole.view(M // block, N * block)
    tiles = tiles_in_blocks(partition.tiles(0, M, N), N, block)
    check_cover(name, M // block, N * block, tiles)
    for rank, held in enumerate(tiles):
        flat = local(partition, rank, whole)
        for tile in held:
            found = view_of(flat, tile.offset, (tile.height, tile.width), tile.strides)
            window = wide[tile.row : tile.row + tile.height, tile.column : tile.column + tile.width]
            assert torch.equal(found, window), tile


@pytest.mark.parametrize("partition", [FlatPartition(((0, 4), (4, 9))), GridPartition(((((0, 4),),), (((4, 9),),)))])
def test_a_vector_is_one_row_in_a_block(partition):
    tiles = tiles_in_blocks(partition.tiles(0, 9, 1), 1, 9)
    check_cover("vector", 1, 9, tiles)
    assert [(t.row, t.column, t.height, t.width) for held in tiles for t in held] == [(0, 0, 1, 4), (0, 4, 1, 5)]
    assert math.prod((1, 9)) == sum(t.numel for held in tiles for t in held)
