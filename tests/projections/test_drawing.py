"""Projections of several matrices from one draw: the bits of each alone, and how many draws there are."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_dist import APOLLO
from apollo_dist.kernels.reduce import as_gemm_operand
from apollo_dist.projections.cache import ProjectionCache
from apollo_dist.projections.gaussian import draw, drawn_together, gaussian, philox_keys
from apollo_dist.projections.slices import Phase, ProjectionSlice, scale_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize(("rank", "length"), [(1, 700), (3, 700), (130, 5000)])
def test_each_of_several_is_as_if_drawn_alone(rank, length, kind):
    starts = [0, 7, 4000]  # the longest slabs come in pieces
    keys = philox_keys(3, [(f"w{i}", i, start) for i, start in enumerate(starts)], CPU)
    drawn = draw(keys, rank, length, torch.float64, kind)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(draw(keys, rank, length, dtype, kind).double(), drawn)
    for i, start in enumerate(starts):
        for dtype in (torch.float32, torch.float64):
            alone = gaussian(3, f"w{i}", i, rank, 9000, start, start + length, dtype=dtype, kind=kind)
            assert torch.equal((drawn[i] * scale_of(rank)).to(dtype), alone)


class Counted(TorchDispatchMode):
    """Counts the look-ups in the table of quantiles: each draw has one."""

    def __init__(self):
        super().__init__()
        self.draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.draws += func is torch.ops.aten.index_select.default
        return func(*args, **(kwargs or {}))


def projections(keep, needed=(True, True, True)):
    """Eight matrices: two ranks, two lengths, all dtypes, and two of signs."""
    kinds = [(4, (0, 50)), (4, (10, 60)), (4, (0, 30)), (3, (0, 50)), (4, (0, 50)), (4, (5, 55))] + [(4, (0, 50))] * 2
    slabs = []
    for k, (rank, (a, b)) in enumerate(kinds):
        dtype, kind = torch.float64 if k == 4 else torch.float32, "rademacher" if k > 5 else "gaussian"
        slabs.append(ProjectionSlice(f"w{k}", rank, dtype, (a, b), ((a, b), (a + 1, b)), needed, kind))
    return ProjectionCache(slabs, CPU, keep=keep), slabs


def check(projection, slab, seed, refresh):
    first, last = slab.columns
    keys = philox_keys(seed, [(slab.name, refresh, first)], CPU)
    want = draw(keys, slab.rank, last - first, slab.dtype, slab.kind)[0]
    assert torch.equal(projection.slab, as_gemm_operand(want))
    assert projection.first == first
    for tile, (a, b) in zip(projection.tiles, slab.edges, strict=True):
        assert torch.equal(tile, projection.slab[a - first : b - first])


@pytest.mark.parametrize("keep", [True, False])
def test_matrices_have_refreshes_of_their_own(keep):
    drawing, slabs = projections(keep)
    # Some without a gradient, which stay behind; a step like the last one; another seed.
    steps = [(1, [0] * 6), (1, [0, None, 0, 0, None, 0]), (1, [1, 0, 1, None, 0, 1]), (1, [1] * 6), (2, [1] * 6)]
    for seed, given in steps:
        refreshes = [*given, *given[:2]]
        drawing.begin(seed, refreshes)
        for phase in (Phase.REDUCE, Phase.OWN):
            for k, slab in enumerate(slabs):
                found = drawing.of(k, phase)
                if refreshes[k] is None:
                    assert found is None
                else:
                    check(found, slab, seed, refreshes[k])


@pytest.mark.parametrize("keep", [True, False])
def test_alike_ones_are_drawn_together_and_only_when_needed(keep):
    drawing, slabs = projections(keep, needed=(False, True, False))

    def draws(refreshes):
        drawing.begin(0, refreshes)
        with Counted() as counted:
            for phase in (Phase.REDUCE, Phase.OWN):
                found = [drawing.of(k, phase) for k in range(len(slabs))]
                assert all((p is None) == (phase == Phase.REDUCE) for p in found)
        return counted.draws

    # Of rank 4, length 50 and float32 there are three; the others are alone. Signs are in no table.
    assert draws([0] * 8) == 4
    assert draws([0] * 8) == (0 if keep else 4)
    assert draws([0, 1, 0, 0, 0, 1, 0, 0]) == (1 if keep else 4)


def test_what_is_not_kept_is_let_go():
    drawing, slabs = projections(keep=False)
    drawing.begin(0, [0] * 8)
    for k in range(len(slabs)):
        found = weakref.ref(drawing.of(k, Phase.OWN))
        assert found() is None


@pytest.mark.parametrize("rank", [1, 4])
def test_a_step_that_redraws_takes_as_many_draws_for_many_matrices_as_for_few(rank):
    def draws(count):
        model = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(count))
        optimizer = APOLLO([{"params": list(model.parameters()), "rank": rank}], cache_projection=False)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        with Counted() as counted:
            optimizer.step()
        return counted.draws

    assert draws(2) == draws(40) == 1


def test_a_draw_is_bounded():
    for device in ("cpu", "cuda"):
        assert drawn_together(1 << 12, 1 << 20, torch.device(device)) == 1
        assert 2 <= drawn_together(128, 512, torch.device(device)) < 10**3
