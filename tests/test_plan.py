"""Tiles and plans: integers only, checked exhaustively on small matrices."""

import itertools

import pytest

from apollo_dist.exchange.plan import MatrixSpec, make_plan
from apollo_dist.layout.tiles import FlatCover, Tile, check_cover, flat_tiles


def cells(tile: Tile) -> list[tuple[int, int]]:
    return [(tile.row + i, tile.column + j) for i in range(tile.height) for j in range(tile.width)]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (5, 1), (4, 3), (3, 5)])
def test_flat_tiles_are_the_range_in_order(m, n):
    for start, stop in itertools.combinations_with_replacement(range(m * n + 1), 2):
        tiles = flat_tiles(n, start, stop)
        assert len(tiles) <= 3
        listed = [(t.offset + k, cell) for t in tiles for k, cell in enumerate(cells(t))]
        assert listed == [(k, divmod(start + k, n)) for k in range(stop - start)]


def test_cover_must_be_exact():
    good = FlatCover(((0, 7), (7, 7), (7, 15))).tiles(0, 3, 5)
    check_cover("w", 3, 5, good)
    for ranges in [((0, 7), (8, 15)), ((0, 8), (7, 15)), ((0, 7), (7, 14)), ((1, 7), (7, 15)), ((0, 5), (10, 15))]:
        with pytest.raises(ValueError, match="w:"):
            check_cover("w", 3, 5, FlatCover(ranges).tiles(0, 3, 5))


def spec(m, n, ranges, **changes):
    values = {"rank": 4, "channel_norms": True, "channel_scales": True, "terms": (2,), **changes}
    return MatrixSpec(name="w", m=m, n=n, tiles=FlatCover(ranges).tiles(0, m, n), **values)


def even(numel, world):
    size = -(-numel // world)
    return tuple((min(r * size, numel), min(r * size + size, numel)) for r in range(world))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("m", "n"), [(6, 5), (5, 6), (4, 4), (1, 9), (9, 1)])
def test_segments_partition_the_channels(m, n, world):
    s = spec(m, n, even(m * n, world))
    (matrix,) = make_plan([s], world).matrices
    assert [c for g in matrix.segments for c in range(g.start, g.stop)] == list(range(max(m, n)))
    for g in matrix.segments:
        assert g.owner in g.holders
        for channel in range(g.start, g.stop):
            holds = {r for r in range(world) for t in s.tiles[r] if channel in range(*t.channels(s.tall))}
            assert set(g.holders) == holds


def test_tall_matrices_send_only_rows_that_boundaries_cut():
    """1000 x 30 over 7 ranks: at most one row is cut at each of the 6 boundaries."""
    m, n, world = 1000, 30, 7
    boundaries = [start for start, _ in even(m * n, world)[1:]]
    cut = {start // n for start in boundaries if start % n}
    plan = make_plan([spec(m, n, even(m * n, world))], world)
    shared = {c for s in plan.matrices[0].segments if s.shared for c in range(s.start, s.stop)}
    assert shared == cut
    assert plan.shared_channels == len(cut) == 6
    # For each cut row what the holder that does not own it has: r + 1 numbers, or its elements if those are fewer.
    expected = 0
    for segment in plan.matrices[0].segments:
        for rank in set(segment.holders) - {segment.owner} if segment.shared else ():
            expected += min(5, sum(t.numel for t in plan.matrices[0].spec.tiles[rank] if t.row == segment.start))
    assert sum(plan.numbers_sent(r)[0] for r in range(world)) == expected < len(cut) * 5


def test_row_shards_of_a_tall_matrix_share_nothing():
    plan = make_plan([spec(10, 4, ((0, 12), (12, 24), (24, 36), (36, 40)), terms=())], 4)
    assert not plan.needs_exchange1
    assert not plan.needs_exchange2


def test_ownership_is_balanced():
    world = 64
    specs = [spec(4096, 11008, even(4096 * 11008, world), rank=256) for _ in range(3)]
    plan = make_plan(specs, world)
    owned = [plan.owned_numbers(r) for r in range(world)]
    assert sum(owned) == 3 * 11008 * 256
    assert max(owned) / (sum(owned) / world) < 1.01


def test_traffic_of_a_llama_7b_layer():
    """Under 3 % of the gradient's bytes at rank 256, and under 0.05 % for Mini; not growing with the world's size."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    gradient = sum(m * n for m, n in shapes)
    for options, limit in [
        ({"rank": 256}, 0.03),
        ({"rank": 1, "channel_norms": False, "channel_scales": False}, 0.0005),
    ]:
        for world in (8, 64):
            plan = make_plan([spec(m, n, even(m * n, world), **options) for m, n in shapes], world)
            for rank in (0, world // 2, world - 1):
                assert sum(plan.numbers_sent(rank)) < limit * gradient


def test_digest_depends_on_every_integer():
    base = make_plan([spec(6, 5, even(30, 3))], 3).digest
    assert base == make_plan([spec(6, 5, even(30, 3))], 3).digest
    for other in [spec(6, 5, (*even(30, 2), (30, 30))), spec(5, 6, even(30, 3)), spec(6, 5, even(30, 3), rank=3)]:
        assert make_plan([other], 3).digest != base
