"""Triton's kernels against the torch code and against float64, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import pytest
import torch

from apollo_dist.kernels import reference, tuned
from apollo_dist.kernels.parts import AdamWPart, ApplyPart, ProjectPart
from apollo_dist.kernels.philox import philox_4x32_10
from apollo_dist.projections.quantiles import quantiles

pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
from apollo_dist.kernels import triton as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The smallest distance of 1 and the next number: a result that is rounded once may be off by half of it.
EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
BETAS, ADAM_EPS = (0.9, 0.999), 1e-6
CHECKSUM = 52235113246685


def random(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def keys(*rows):
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("world", [1, 2, 7])
@pytest.mark.parametrize("numbers", [1, 2047, 5000])
def test_sums_over_ranks_are_taken_in_their_order(world, numbers):
    parts = random(world, numbers + 3)[:, 1 : numbers + 1]  # a part of what arrived
    parts[:, numbers // 2] = float("inf")
    want, got = torch.full((2, numbers + 1), 7.0, device=DEVICE).unbind()
    reference.add_up(parts, want[:-1])
    kernels.add_up(parts, got[:-1])
    assert torch.equal(got, want)


# draw


@pytest.mark.parametrize("rank", [1, 3, 8, 129, 256])
def test_draw_is_bit_equal(rank):
    slabs = keys((5, 6, 7, 8, 0), (2**32 - 1, 2**31, 2**32 - 1, 2**31 + 1, 4000))
    for length in (1, 77, 1025) if rank < 10 else (33,):
        # With memory behind it, where a kernel must not write.
        want, got = (torch.full((3, rank, length), 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        got = torch.cat([got, got.new_full((8, rank, length), 7.0)])
        reference.draw(slabs, quantiles(DEVICE), want[:2])
        kernels.draw(slabs, quantiles(DEVICE), got[:2])
        assert torch.equal(got[:3], want)
        assert bool((got[2:] == 7.0).all())


@pytest.mark.parametrize("rank", [1, 31, 129, 256])
def test_draw_of_signs_is_bit_equal(rank):
    slabs = keys((5, 6, 7, 8, 0), (2**32 - 1, 2**31, 2**32 - 1, 2**31 + 1, 4000))
    want, got = (torch.full((3, rank, 77), 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    reference.draw_signs(slabs, want[:2])
    kernels.draw_signs(slabs, got[:2])
    assert torch.equal(got, want)
    assert bool((got[:2].abs() == 1.0).all())


def test_draw_takes_eight_rows_of_a_call_of_philox():
    """By the plain code of Philox, element by element, and a slab equals the columns of the whole."""
    table, whole = quantiles(DEVICE), torch.empty((1, 19, 40), dtype=torch.bfloat16, device=DEVICE)
    reference.draw(keys((3, 4, 5, 6, 0)), table, whole)
    for row, column in [(0, 0), (7, 39), (8, 1), (18, 21)]:
        counter = tuple(torch.tensor([value]) for value in (column, row // 8, 5, 6))
        words = philox_4x32_10(counter, (torch.tensor([3]), torch.tensor([4])))
        word = int(words[row % 8 // 2])
        index = word >> 16 if row % 2 else word & 0xFFFF
        assert whole[0, row, column] == table[index]
    slab = torch.empty((1, 19, 13), dtype=torch.bfloat16, device=DEVICE)
    kernels.draw(keys((3, 4, 5, 6, 11)), table, slab)
    assert torch.equal(slab, whole[:, :, 11:24])


def test_the_table_is_normal():
    table = quantiles(torch.device("cpu"))
    values = table.double()
    assert torch.equal(table, -table.flip(0)) and bool((values.diff() >= 0).all())
    assert not bool((values == 0).any()), "an infinite gradient times 0 would be NaN"
    assert values.square().mean() == pytest.approx(1.0, abs=5e-5)
    assert values.pow(4).mean() == pytest.approx(3.0, abs=5e-3)
    # The same bits everywhere: a checksum of all of them.
    bits = table.view(torch.int16).long() & 0xFFFF
    assert int((bits * torch.arange(1, 65537)).sum()) == CHECKSUM


# project


def check_project(parts, rank, channels, *, norms=True, alpha=0.25):
    """Against float64; returns the kernel's results."""
    out, squares = torch.full((channels, rank), 9.0, device=DEVICE), torch.full((channels,), 9.0, device=DEVICE)
    kernels.project(parts, alpha, out, squares if norms else None)
    exact, size, lengths = (torch.zeros(s, dtype=torch.float64) for s in ((channels, rank),) * 2 + ((channels,),))
    for grad, columns, first, *_ in parts:
        rows, g, p = slice(first, first + grad.shape[0]), grad.double().cpu(), columns.double().cpu()
        exact[rows] += g @ p * alpha
        size[rows] += g.abs() @ p.abs() * alpha
        lengths[rows] += g.square().sum(1)
    # A sum in fp32 is off by some 2**-24 of its terms' sizes for each of a few of its roundings.
    assert bool(((out.double().cpu() - exact).abs() <= 2.0**-21 * size).all())
    want, want_squares = torch.empty_like(out), torch.empty_like(squares)
    reference.project(parts, alpha, want, want_squares)
    assert bool(((out - want).abs().double().cpu() <= 2.0**-20 * size).all())
    if norms:
        torch.testing.assert_close(squares.double().cpu(), lengths, rtol=2.0**-20, atol=0.0)
    return out, squares


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 129, 256])
def test_project_of_odd_sizes(rank, dtype):
    """Tall, wide (transposed), one row and one column, at odd offsets, in one launch for each kind."""
    flat = random(9000, dtype=dtype)

    def columns_of(k):
        """As draw writes them, (r, columns), between numbers that must not be multiplied by anything."""
        slab = torch.full((rank, k + 9), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        slab[:, 7 : 7 + k] = random(rank, k, seed=1)
        return slab.t()[7 : 7 + k]

    shapes = [(70, 33), (1, 130), (17, 1), (1, 1), (5, 0)]
    parts, first, at = [], 0, 3
    for c, k in shapes:
        parts.append(ProjectPart(flat[at : at + c * k].view(c, k), columns_of(k), first))
        first, at = first + c, at + c * k + 1
    for c, k in [(65, 30), (3, 140)]:
        parts.append(ProjectPart(flat[at : at + c * k].view(k, c).t(), columns_of(k), first))
        first, at = first + c, at + c * k + 1
    check_project(parts, rank, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 5])
def test_project_sums_tiles_of_one_channel(rank, dtype):
    """A wide matrix that a flat boundary cuts: a part of a row, rows, a part of a row. All hold the same channels."""
    local, n = random(4 * 40 - 13 - 9, dtype=dtype), 40
    columns = random(rank, 6, seed=2, dtype=torch.bfloat16).t()
    head, body, tail = local[:27].view(1, 27).t(), local[27:107].view(2, n).t(), local[107:].view(1, 31).t()
    parts = [
        ProjectPart(head, columns[:1], 13),
        ProjectPart(body, columns[1:3], 0),
        ProjectPart(tail, columns[3:4], 0),
        ProjectPart(random(4, 5, dtype=dtype), columns[1:6], n),
    ]
    out, squares = check_project(parts, rank, n + 4)
    again = [t.clone() for t in (out, squares)]
    kernels.project(parts, 0.25, out, squares)
    assert all(map(torch.equal, again, (out, squares)))  # in a fixed order, without atomics


@pytest.mark.parametrize("norms", [True, False])
def test_totals_are_the_matrices_squared_norms(norms):
    """Of a matrix in one part, one in two that share channels, and one of whose rows nobody has any elements."""
    grads = [random(5, 7), random(6, 3), random(4, 2), random(2, 0)]
    columns = [random(grad.shape[1], 2, seed=9, dtype=torch.bfloat16) for grad in grads]
    places = [(0, 0), (5, 3), (7, 3), (11, 4)]
    parts = [ProjectPart(g, p, first, k) for g, p, (first, k) in zip(grads, columns, places, strict=True)]
    for function in (kernels.project, tuned.project, reference.project):
        taken = [part._replace(columns=part.columns.float()) for part in parts] if function is tuned.project else parts
        totals: list = []
        out, squares = torch.empty((13, 2), device=DEVICE), torch.empty(13, device=DEVICE)
        function(taken, 1.0, out, squares if norms else None, totals)
        for first, last in ((0, 5), (5, 13)):  # sums of parts that share channels, and zeros where nobody has elements
            shown = [part for part in parts if first <= part.first < last]
            exact = torch.zeros((13, 2), dtype=torch.float64, device=DEVICE)
            for part in shown:
                exact[part.first : part.first + len(part.grad)] += part.grad.double() @ part.columns.double()
            torch.testing.assert_close(out[first:last].double(), exact[first:last], rtol=1e-5, atol=1e-5)
        found = {k: sum(float(t.double().square().sum()) for t, of in totals if of == k) for k in (0, 3, 4)}
        want = {0: grads[0], 3: torch.cat([grads[1].reshape(-1), grads[2].reshape(-1)]), 4: grads[3]}
        assert found == {k: pytest.approx(float(g.double().square().sum()), rel=1e-6) for k, g in want.items()}


def test_project_without_norms_and_of_rows_that_nobody_has():
    parts = [ProjectPart(random(3, 0), random(0, 2, dtype=torch.bfloat16), 0)]
    out, squares = check_project(parts, 2, 3)
    assert not out.any() and not squares.any()
    check_project([ProjectPart(random(3, 4), random(4, 2, dtype=torch.bfloat16), 0)], 2, 3, norms=False)


def test_fp32_gradients_keep_their_last_bits():
    """Each part's product is exact: with one term a sum, the result is the rounded product, as in fp32 arithmetic."""
    grad = random(300, 1) * 10.0 ** torch.linspace(-20, 20, 300, device=DEVICE)[:, None]
    columns = random(1, 16, seed=3, dtype=torch.bfloat16)
    out = torch.empty((300, 16), device=DEVICE)
    kernels.project([ProjectPart(grad, columns, 0)], 1.0, out, None)
    torch.testing.assert_close(out.double(), grad.double() @ columns.double(), rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_that_are_no_ordinary_numbers(rank, dtype):
    """Zero, denormal, huge, infinite, NaN: what the torch code gives."""
    info = torch.finfo(dtype)
    rows = [0.0, info.smallest_normal / 4, info.max, -info.max, torch.inf, -torch.inf, torch.nan]
    grad = torch.zeros((len(rows), 5), dtype=dtype, device=DEVICE)
    grad[:, 2] = torch.tensor(rows, dtype=dtype)
    if dtype == torch.float32:
        grad[-1, 2:3].view(torch.int32).fill_(0x7F800001)  # a NaN whose upper half alone is an infinity
        assert grad[-1, 2].isnan()
    columns = random(5, rank, seed=4, dtype=torch.bfloat16) * 0.125
    got, want = (torch.empty((len(rows), rank), device=DEVICE) for _ in range(2))
    squares, want_squares = (torch.empty(len(rows), device=DEVICE) for _ in range(2))
    kernels.project([ProjectPart(grad, columns, 0)], 1.0, got, squares)
    reference.project([ProjectPart(grad, columns, 0)], 1.0, want, want_squares)
    # 2**-133 is the smallest bf16 number, below which the last bits of a denormal fp32 gradient are lost. Triton's
    # interpreter converts denormal bf16 numbers, those below 2**-126, to wrong ones that are as small.
    lost = 2.0**-126 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 2.0**-133
    torch.testing.assert_close(got, want, rtol=1e-6, atol=lost, equal_nan=True)
    torch.testing.assert_close(squares, want_squares, rtol=1e-6, atol=0.0, equal_nan=True)


# moments


@pytest.mark.parametrize("rank", [1, 3, 8, 129, 256, 300])
@pytest.mark.parametrize("channels", [1, 37])
def test_moments(channels, rank):
    low_rank = random(channels, rank)
    low_rank[0, 0] = 0.0
    exp_avg, exp_avg_sq = random(channels, rank, seed=1) * 0.1, random(channels, rank, seed=2).square() * 0.01
    wide = [t.double() for t in (exp_avg, exp_avg_sq, low_rank)]
    plain = [t.clone() for t in (exp_avg, exp_avg_sq, low_rank)]
    results = []
    for function, tensors in (
        (reference.moments, wide),
        (reference.moments, plain),
        (kernels.moments, (exp_avg, exp_avg_sq, low_rank)),
    ):
        sums = [torch.empty(channels, dtype=tensors[0].dtype, device=DEVICE) for _ in range(2)]
        function(*tensors, *sums, betas=BETAS, eps=ADAM_EPS)
        results.append([*tensors, *sums])
    for exact, torch_code, got in zip(*results, strict=True):
        # Absolute, too: the terms of a moment are of the order of 1 and may cancel.
        torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(got, torch_code, rtol=3e-6, atol=1e-7)


def test_moments_of_no_ordinary_numbers():
    low_rank = torch.tensor([[0.0], [1e-40], [3e38], [torch.inf], [torch.nan]], device=DEVICE)
    sides = []
    for function in (reference.moments, kernels.moments):
        tensors = [torch.zeros_like(low_rank), torch.zeros_like(low_rank), low_rank.clone()]
        sums = [torch.empty(5, device=DEVICE) for _ in range(2)]
        function(*tensors, *sums, betas=BETAS, eps=ADAM_EPS)
        sides.append([*tensors, *sums])
    for want, got in zip(*sides, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-45, equal_nan=True)


# apply


def rounding(dtype, weight):
    """A result in fp32 that is off by a few bits may round to the next number of the weight's dtype."""
    return {"rtol": EPS[dtype] if dtype != torch.float32 else 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("decay_first", [False, True])
@pytest.mark.parametrize(
    ("weights", "grads"),
    [*[(dtype, dtype) for dtype in DTYPES], (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_apply(weights, grads, decay_first):
    flat, grad = random(12000, dtype=weights), random(12000, seed=1, dtype=grads)
    scale = random(2000, seed=2).abs()
    coefficients = torch.tensor([[-0.1, 1.0], [-0.3, 0.875], [0.2, 0.5]], device=DEVICE)

    def parts(flat):
        found, at, first = [], 1, 0
        for i, (c, k) in enumerate([(9, 33), (1, 1030), (1500, 1), (1, 1), (0, 4), (3, 0)]):
            for transposed in (False, True):
                views = [t[at : at + c * k].view((k, c) if transposed else (c, k)) for t in (flat, grad)]
                views = [view.t() if transposed else view for view in views]
                by = scale[first : first + c] if i % 2 == 0 else None
                found.append(ApplyPart(*views, by, i % 3))
                at, first = at + c * k + 1, first + c % 7
        rows = flat[at : at + 60].view(6, 10)[:, 3:8]  # a tile inside rows of a wider shard
        return [*found, ApplyPart(rows, grad[at : at + 60].view(6, 10)[:, 3:8], scale[:6], 1)]

    got, want, exact = flat.clone(), flat.clone(), flat.double()
    kernels.apply(parts(got), coefficients, decay_first=decay_first)
    reference.apply(parts(want), coefficients, decay_first=decay_first)
    assert not torch.equal(got, flat)
    torch.testing.assert_close(got, want, **rounding(weights, flat))
    for part in parts(exact):
        c, d = coefficients[part.matrix].double()
        by = c if part.scale is None else (c * part.scale.double())[:, None]
        change = by * part.grad.double()
        part.weight.copy_(part.weight * d + change if decay_first else (part.weight + change) * d)
    torch.testing.assert_close(got.double(), exact, **rounding(weights, flat))


def test_apply_of_no_ordinary_numbers():
    grad = torch.tensor([[0.0, 1e-40, 3e38, torch.inf, torch.nan]], device=DEVICE)
    for scale in (None, torch.zeros(1, device=DEVICE), torch.full((1,), torch.nan, device=DEVICE)):
        got, want = torch.ones_like(grad), torch.ones_like(grad)
        coefficients = torch.tensor([[2.0, 0.5]], device=DEVICE)
        kernels.apply([ApplyPart(got, grad, scale, 0)], coefficients)
        reference.apply([ApplyPart(want, grad, scale, 0)], coefficients)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0, equal_nan=True)


# AdamW's part


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_adamw(weights, maximize):
    coefficients = torch.tensor([0.1, 0.75], device=DEVICE)
    sides, whole = [], []
    for _ in range(2):
        flat, exp_avg, exp_avg_sq = random(9000, dtype=weights), random(9000, seed=1), random(9000, seed=2).square()
        whole.append([flat, exp_avg, exp_avg_sq])
        sides.append([
            AdamWPart(
                flat[1 + at : 1 + at + count], random(count, seed=at, dtype=grads),
                exp_avg[at : at + count], exp_avg_sq[at : at + count],
            )
            for at, count, grads in [
                (0, 4097, weights), (4098, 1, weights), (4100, 0, weights), (4101, 50, torch.float32),
            ]
        ])  # fmt: skip
    for function, parts in zip((kernels.adamw, reference.adamw), sides, strict=True):
        function(parts, coefficients, betas=BETAS, eps=ADAM_EPS, maximize=maximize, decay_first=not maximize)
    # Of the whole buffers, so that nothing was written between and behind the parts.
    for number, (got, want) in enumerate(zip(*whole, strict=True)):
        limits = {"rtol": 1e-6, "atol": 1e-7} if number else rounding(weights, got)
        torch.testing.assert_close(got, want, **limits)
