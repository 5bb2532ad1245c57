"""Tiles and plans: integers only, checked exhaustively on small matrices."""

import itertools
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from apollo_dist.exchange import buckets
from apollo_dist.exchange.messages import Elements, Projected
from apollo_dist.exchange.plan import MatrixSpec, make_plan
from apollo_dist.exchange.replies import ReplyRoutes
from apollo_dist.exchange.routes import ReduceRoutes
from apollo_dist.sharding.regions import FlatPartition, Tile, check_cover, cut_ranges, flat_tiles, row_ranges


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
    good = FlatPartition(((0, 7), (7, 7), (7, 15))).tiles(0, 3, 5)
    check_cover("w", 3, 5, good)
    for ranges in [((0, 7), (8, 15)), ((0, 8), (7, 15)), ((0, 7), (7, 14)), ((1, 7), (7, 15)), ((0, 5), (10, 15))]:
        with pytest.raises(ValueError, match="w:"):
            check_cover("w", 3, 5, FlatPartition(ranges).tiles(0, 3, 5))


def spec(m, n, ranges, **changes):
    values = {"rank": 4, "channel_norms": True, "channel_scales": True, "terms": 1, "by_rows": m >= n, **changes}
    return MatrixSpec(
        name="w",
        m=m,
        n=n,
        state=(values["rank"],),
        matrix_state=1,
        element_state=0,
        tiles=FlatPartition(ranges).tiles(0, m, n),
        **values,
    )


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
            holds = {r for r in range(world) for t in s.tiles[r] if channel in range(*t.channels(s.by_rows))}
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
    plan = make_plan([spec(10, 4, ((0, 12), (12, 24), (24, 36), (36, 40)), terms=0)], 4)
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


# How engines cut an m x n matrix: rows, even flat parts, and a flat buffer of several matrices, of which it is a part.
def divisions(m, n, world):
    size = -(-(m * n + 37) // world)
    return [row_ranges(m, n, world), even(m * n, world), cut_ranges(20, m * n, size, world)]


def columns(m, n, world):
    """Tiles of a matrix whose columns are dealt out in two runs a rank, as strided shards do."""
    edges = [n * k // (2 * world) for k in range(2 * world + 1)]
    tiles, offsets = [[] for _ in range(world)], [0] * world
    for k, (start, stop) in enumerate(pairwise(edges)):
        if stop > start:
            tiles[k % world].append(Tile(0, start, m, stop - start, offsets[k % world]))
            offsets[k % world] += m * (stop - start)
    return tuple(map(tuple, tiles))


@pytest.fixture(params=[None, 40], ids=["", "in buckets"])
def bucketed(request, monkeypatch):
    """Whether exchange 1 travels in buckets of at most so many numbers, about."""
    if request.param is not None:
        monkeypatch.setattr(buckets, "NUMBERS", request.param)
        monkeypatch.setattr(buckets, "CHANNELS", 1)
    return request.param is not None


def plans(world):
    """Plans of several matrices of every shape and partition, at ranks from one to the largest."""
    shapes = [(6, 25), (25, 6), (5, 31), (9, 9), (40, 8), (6, 25), (3, 10)]
    for options in ({}, {"channel_norms": False, "channel_scales": False, "terms": 3}, {"terms": 0}):
        for r in (1, 2, 3):
            for k in range(3):
                specs = [spec(m, n, divisions(m, n, world)[k], rank=r, **options) for m, n in shapes]
                yield make_plan(specs, world)
            flat = [spec(m, n, even(m * n, world), rank=r, **options) for m, n in shapes]
            yield make_plan([replace(s, tiles=columns(s.m, s.n, world)) for s in flat], world)


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_both_ends_of_every_message_agree(world, bucketed):
    """What each rank sends is what its peer expects, and what the plan counts, whatever the partition."""
    kinds = set()
    for plan in plans(world):
        assert bucketed or plan.buckets == 1
        first = [ReduceRoutes(plan, rank) for rank in range(world)]
        for a, b in itertools.product(range(world), repeat=2):
            for here, there in zip(first[a].routes, first[b].routes, strict=True):
                assert here[b].send_numbers == there[a].receive_numbers
                kinds |= {type(piece) for piece in here[b].send}
        for rank in range(world):
            sent = sum(route.send_numbers for b in first[rank].routes for k, route in enumerate(b) if k != rank)
            assert sent == plan.numbers_sent(rank)[0]
            owned = sum(c.owned.count * m.spec.rank for c, m in zip(first[rank].channels, plan.matrices, strict=True))
            assert owned == plan.owned_numbers(rank)
        if plan.needs_exchange2 and not plan.reduces:
            second = [ReplyRoutes(plan, rank) for rank in range(world)]
            for a, b in itertools.product(range(world), repeat=2):
                assert second[a].send_numbers[b] == second[b].receive_numbers[a]
            for rank in range(world):
                sent = sum(second[rank].send_numbers) - second[rank].send_numbers[rank]
                assert sent == plan.numbers_sent(rank)[1]
    assert kinds == {Projected, Elements}


@pytest.mark.parametrize("world", [2, 3, 5, 8])
@pytest.mark.usefixtures("bucketed")
def test_every_element_of_a_shared_channel_reaches_its_owner_once(world):
    """As itself or in a projection; elements never with more numbers than their projection has."""
    for plan in plans(world):
        first = [ReduceRoutes(plan, rank) for rank in range(world)]
        for i, m in enumerate(plan.matrices):
            seen = Counter()
            for rank in range(world):
                channels = {c for start, stop in first[rank].channels[i].projected.ranges for c in range(start, stop)}
                tiles = m.spec.tiles[rank]
                seen.update(c for t in tiles for c in cells(t) if c[0 if m.spec.by_rows else 1] in channels)
                for route in itertools.chain(*first[rank].routes):
                    for piece in route.send:
                        if isinstance(piece, Elements) and piece.matrix == i:
                            tile = tiles[piece.tile]
                            start = tile.channels(m.spec.by_rows)[0]
                            chosen = range(start + piece.first, start + piece.last)
                            seen.update(c for c in cells(tile) if c[0 if m.spec.by_rows else 1] in chosen)
            shared = {c for s in m.segments if s.shared for c in range(s.start, s.stop)}
            everything = itertools.product(range(m.spec.m), range(m.spec.n))
            expected = {c for c in everything if c[0 if m.spec.by_rows else 1] in shared}
            assert set(seen) == expected
            assert set(seen.values()) <= {1}


def test_the_smaller_of_projection_and_elements_travels():
    """A 64 x 200 matrix in rows, rank 16 and channel norms: 17 numbers a channel, or as many as the rank has rows."""
    for world, numbers in ((2, 17), (3, 17), (4, 16), (8, 8), (32, 2), (64, 1)):
        plan = make_plan([spec(64, 200, row_ranges(64, 200, world), rank=16)], world)
        owned = [int(plan.matrices[0].shares.counts[plan.matrices[0].shares.owners == k].sum()) for k in range(world)]
        rows = [min(numbers, 64 - k * -(-64 // world)) for k in range(world)]
        assert [plan.numbers_sent(k)[0] for k in range(world)] == [
            (200 - own) * row for own, row in zip(owned, rows, strict=True)
        ]


def test_buckets_are_alike_for_every_rank():
    """LLaMA-7B's wide matrices under FSDP2: each rank sends and receives 64 MB a bucket at most, and in all of them."""
    world, r = 8, 256
    plan = make_plan([spec(4096, 11008, row_ranges(4096, 11008, world), rank=r) for _ in range(32)], world)
    assert plan.buckets == -(-32 * 11008 * (r + 1) // buckets.NUMBERS) == 6
    for rank in range(world):
        for routes in ReduceRoutes(plan, rank).routes:
            for numbers in (sum(x.send_numbers for x in routes), sum(x.receive_numbers for x in routes)):
                assert 0.9 * buckets.NUMBERS / 1.04 < numbers < 1.04 * buckets.NUMBERS
    assert plan.numbers_sent(0)[0] == 7 * 4 * 11008 * (r + 1)
    assert plan.digest != replace(plan, buckets=1, matrices=tuple(map(_in_one, plan.matrices))).digest


def _in_one(matrix):
    return replace(matrix, cuts=matrix.cuts._replace(buckets=matrix.cuts.buckets * 0))


def test_equal_matrices_are_dealt_as_one_line():
    """Ten equal matrices on ten ranks: each owns most of one, rather than a tenth of each."""
    plan = make_plan([spec(40, 60, row_ranges(40, 60, 10)) for _ in range(10)], 10)
    assert [plan.owned_numbers(k) for k in range(10)] == [60 * 4] * 10
    assert sum(len(m.shares.owners) for m in plan.matrices) == 10


def test_norm_terms_are_reduced_where_that_is_less():
    tensor = {"rank": 1, "channel_norms": False, "channel_scales": False, "terms": 3}
    specs = [spec(10, 7, even(70, 4), **tensor)] * 3
    plan = make_plan(specs, 4)
    assert plan.reduces and plan.reduced_numbers == 9
    assert plan.numbers_sent(0)[1] == 14  # 2 * 3 / 4 of 9, rounded up
    # With scaling factors for each of many channels the all-to-all, which sends them once, is less.
    assert not make_plan([spec(10, 700, row_ranges(10, 700, 4))], 4).reduces


def test_cut_ranges_equal_their_definition():
    for start, numel, partition, world in itertools.product((0, 3, 10), (0, 1, 9, 20), (1, 4, 10), (1, 3, 7)):
        expected = []
        for rank in range(world):
            low, high = max(start, rank * partition), min(start + numel, (rank + 1) * partition)
            expected.append((low - start, high - start) if low < high else (0, 0))
        assert cut_ranges(start, numel, partition, world) == tuple(expected)
