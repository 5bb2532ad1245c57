"""R = G P^T and the squared norms of channels, in one read of G as it is stored.

P is bf16. A bf16 G is multiplied by it as it is: the products are exact, and only the fp32 sums round. Any other G is
split into bf16 parts that sum to it exactly: two for fp16 (11 bits in 8 + 3), three for fp32 (24 bits in 8 + 8 + 8). A
part is cut off and not rounded, so that it never becomes infinite. The parts' products are exact as well, so that the
result has the accuracy of fp32 sums. Only what lies below 2**-133, the smallest bf16 number, is lost.

With r = 1 there is nothing for tensor cores to do: the product is a sum over the tile that is read for the norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from ..transfer import to_device
from .dtypes import DTYPES
from .tables import EIGHT, blocks_of, interpreted, launch, layout, rows_on

if TYPE_CHECKING:
    from ..parts import ProjectPart

# Parts that a gradient is split into.
_SPLIT = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# Most columns of R that one program sums; a larger rank reads G again, mostly from the second-level cache.
_RANK = 256

# dtype, unit and alignment of gradients; unit and alignment of projections, as of ``layout``.
_Kind = tuple[tuple[torch.dtype, int, bool], tuple[int, bool]]


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """``acc`` + a b of fp32 numbers that are bf16 numbers; Triton's interpreter cannot multiply bf16."""
    if INTERPRETED:
        return tl.dot(a, b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b, acc)


@triton.jit
def _cut(g):
    """The leading 8 bits of fp32 numbers; infinities and NaN as they are."""
    bits = g.to(tl.int32, bitcast=True) & -65536
    return tl.where(g == g, bits.to(tl.float32, bitcast=True), g)


@triton.jit
def _program(programs, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's row of the table of programs, as ``_programs`` makes it."""
    program = programs + tl.program_id(0) * 4
    row, count, first, last = tl.load(program), tl.load(program + 1), tl.load(program + 2), tl.load(program + 3)
    if ALIGNED and UNIT == 1:
        row, count = tl.multiple_of(row, 8), tl.multiple_of(count, 8)
    return row, count, first, last


@triton.jit
def _read(segment, GRAD: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
          P_UNIT: tl.constexpr, P_ALIGNED: tl.constexpr):  # fmt: skip
    """A row of the table of segments, as ``_segment`` makes it."""
    grad = tl.load(segment).to(tl.pointer_type(GRAD))
    columns = tl.load(segment + 1).to(tl.pointer_type(tl.bfloat16))
    inner, start = tl.load(segment + 2), tl.load(segment + 3)
    g_c, g_k, p_k, p_r = tl.load(segment + 4), tl.load(segment + 5), tl.load(segment + 6), tl.load(segment + 7)
    # What the table says is aligned the compiler has to be told: vectors of 16 bytes, also where a mask ends.
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
        if UNIT == 1:
            start, g_k = tl.multiple_of(start, 8), tl.multiple_of(g_k, 8)
        else:
            inner, g_c = tl.multiple_of(inner, 8), tl.multiple_of(g_c, 8)
    if P_ALIGNED:
        columns = tl.multiple_of(columns, 16)
        if P_UNIT == 1:
            inner, p_r = tl.multiple_of(inner, 8), tl.multiple_of(p_r, 8)
        else:
            p_k = tl.multiple_of(p_k, 8)
    return grad, columns, inner, start, g_c, g_k, p_k, p_r


@triton.jit
def _load(memory, a, b, a_end, b_end, s_a, s_b, UNIT: tl.constexpr):
    """The elements (a, b) of a rectangle; UNIT says which stride is 1, as in apply.py."""
    if UNIT == 1:
        at = a[:, None] + b[None, :] * s_b
    elif UNIT == 2:
        at = a[:, None] * s_a + b[None, :]
    else:
        at = a[:, None] * s_a + b[None, :] * s_b
    return tl.load(memory + at, mask=(a < a_end)[:, None] & (b < b_end)[None, :], other=0.0)


@triton.jit
def _project(
    programs, segments, out, squares, rank, alpha,
    GRAD: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    P_UNIT: tl.constexpr, P_ALIGNED: tl.constexpr, NORMS: tl.constexpr,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, count, first, last = _program(programs, UNIT, ALIGNED)
    j = tl.program_id(1) * RANK + tl.arange(0, RANK)
    c = tl.arange(0, CHANNELS).to(tl.int64)
    acc = tl.zeros([CHANNELS, RANK], dtype=tl.float32)
    sums = tl.zeros([CHANNELS], dtype=tl.float32)
    for s in range(first, last):
        grad, columns, inner, start, g_c, g_k, p_k, p_r = _read(
            segments + s * 8, GRAD, UNIT, ALIGNED, P_UNIT, P_ALIGNED
        )
        for at in range(0, inner, INNER):
            k = at + tl.arange(0, INNER).to(tl.int64)
            g = _load(grad, row - start + c, k, row - start + count, inner, g_c, g_k, UNIT).to(tl.float32)
            p = _load(columns, k, j, inner, rank, p_k, p_r, P_UNIT)
            if NORMS:
                sums += tl.sum(g * g, 1)
            if SPLIT == 1:
                acc = _dot(g, p, acc, INTERPRETED)
            else:
                high = _cut(g)
                # Nothing is left of an infinity or NaN, of which inf - inf would make NaN.
                rest = tl.where(tl.abs(high) < float("inf"), g - high, 0.0)
                acc = _dot(high, p, acc, INTERPRETED)
                middle = _cut(rest)
                acc = _dot(middle, p, acc, INTERPRETED)
                if SPLIT == 3:
                    acc = _dot(rest - middle, p, acc, INTERPRETED)
    mask = (c < count)[:, None] & (j < rank)[None, :]
    tl.store(out + (row + c)[:, None] * rank + j[None, :], acc * alpha, mask=mask)
    if NORMS:  # noqa: SIM102
        if tl.program_id(1) == 0:  # NORMS is known at compile time, this is not
            tl.store(squares + row + c, sums, mask=c < count)


@triton.jit
def _project_one(
    programs, segments, out, squares, alpha,
    GRAD: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, P_UNIT: tl.constexpr, P_ALIGNED: tl.constexpr,
    NORMS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Of rank 1: products and squares are summed element by element, and over the tile at the end."""
    row, count, first, last = _program(programs, UNIT, ALIGNED)
    c = tl.arange(0, CHANNELS).to(tl.int64)
    products = tl.zeros([CHANNELS, INNER], dtype=tl.float32)
    square = tl.zeros([CHANNELS, INNER], dtype=tl.float32)
    for s in range(first, last):
        grad, columns, inner, start, g_c, g_k, p_k, p_r = _read(
            segments + s * 8, GRAD, UNIT, ALIGNED, P_UNIT, P_ALIGNED
        )
        for at in range(0, inner, INNER):
            k = at + tl.arange(0, INNER).to(tl.int64)
            g = _load(grad, row - start + c, k, row - start + count, inner, g_c, g_k, UNIT).to(tl.float32)
            p = _load(columns, k, tl.arange(0, 1), inner, 1, p_k, p_r, P_UNIT).to(tl.float32)
            products += g * tl.reshape(p, [1, INNER])
            if NORMS:
                square += g * g
    tl.store(out + row + c, tl.sum(products, 1) * alpha, mask=c < count)
    if NORMS:
        tl.store(squares + row + c, tl.sum(square, 1), mask=c < count)


def project(
    parts: Sequence[ProjectPart],
    alpha: float,
    out: Tensor,
    squares: Tensor | None,
    totals: list[tuple[Tensor, int]] | None = None,
) -> None:
    """As ``kernels.reference.project``; one launch for each dtype and memory layout of gradients."""
    if totals is not None and squares is None:
        squares = torch.empty(out.shape[0], dtype=torch.float32, device=out.device)
    rank = out.shape[1]
    used = [part for part in parts if part.grad.numel()]
    for kind, members in _alike(used).items():
        (dtype, unit, aligned), (p_unit, p_aligned) = kind
        tile = _tile(rank, dtype, unit)
        rows = tuple((part.first, part.grad.shape[0]) for part in members)
        programs, order = _programs(rows, tile.channels, out.device)
        segments = [_segment(members[i]) for i in order]
        tables = programs, rows_on(out.device, segments)
        constants: dict[str, Any] = {
            "GRAD": DTYPES[dtype], "UNIT": unit, "ALIGNED": aligned, "P_UNIT": p_unit, "P_ALIGNED": p_aligned,
            "NORMS": squares is not None, "CHANNELS": tile.channels, "INNER": tile.inner,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        written = out, out if squares is None else squares
        cost = partial(_cost, members, out, squares)
        if rank == 1:
            launch(_project_one, (len(programs),), out.device, cost, *tables, *written, alpha, **constants)
        else:
            constants |= {"SPLIT": _SPLIT[dtype], "RANK": tile.rank, "INTERPRETED": interpreted()}
            grid = len(programs), blocks_of(rank, tile.rank)
            launch(_project, grid, out.device, cost, *tables, *written, rank, alpha, **constants)
    _nothing(parts, out, squares)
    if totals is not None and squares is not None:
        # Of each matrix the norms of its channels, whose rows follow each other.
        roots = squares.sqrt()
        rows_of: dict[int, tuple[int, int]] = {}
        for part in used:
            first, last = rows_of.get(part.matrix, (part.first, part.first))
            rows_of[part.matrix] = min(first, part.first), max(last, part.first + part.grad.shape[0])
        totals += [(roots[first:last], matrix) for matrix, (first, last) in rows_of.items()]


class _Tile(NamedTuple):
    """What one program computes at a time, with how many warps, and how many loads of G and P are under way."""

    channels: int
    inner: int
    rank: int
    warps: int
    stages: int


def _tile(rank: int, dtype: torch.dtype, unit: int) -> _Tile:
    """The tile of a launch.

    Of rank 1 only reading counts: a warp reads what is contiguous in memory. Of other ranks the tile is that of a
    product on tensor cores. A program has all columns of R, up to 256, so that G is read once, and as many channels
    as its registers take, for each program reads all of P. These tiles are the largest that the compiler keeps in
    registers on an A100 and an H100, and in the 99 KB of shared memory of smaller GPUs (``benchmarks/compiled.py``).

    Args:
        rank: of R.
        dtype: of the gradients.
        unit: along which dimension they are contiguous.
    """
    if rank == 1:
        return _Tile(128, 64, 1, 8, 1) if unit == 1 else _Tile(16, 512, 1, 8, 1)
    width = max(16, min(_RANK, triton.next_power_of_2(rank)))
    if width < 256:  # a gradient that is split takes more registers
        return _Tile(128, 64 if dtype == torch.bfloat16 else 32, width, 8 if width == 128 else 4, 3)
    return _Tile(64, 32, width, 8, 3) if dtype == torch.float32 else _Tile(128, 32, width, 8, 4)


def _alike(parts: Sequence[ProjectPart]) -> dict[_Kind, list[ProjectPart]]:
    """Parts by dtype and memory layout; parts of one channel stay together, as one program sums them."""
    kinds: dict[_Kind, list[ProjectPart]] = {}
    for members in _connected(parts):
        unit, aligned = layout(*(part.grad for part in members))
        if unit == 1:  # where a program begins follows from where parts of its channels begin
            aligned = aligned and all(part.first % EIGHT == 0 for part in members)
        projection = layout(*(part.columns for part in members if part.columns is not None))
        kinds.setdefault(((members[0].grad.dtype, unit, aligned), projection), []).extend(members)
    return kinds


def _connected(parts: Sequence[ProjectPart]) -> list[list[ProjectPart]]:
    """Parts by runs whose rows overlap, each in the order given."""
    ordered = sorted(range(len(parts)), key=lambda i: (parts[i].first, i))
    runs: list[list[int]] = []
    end = -1
    for i in ordered:
        if runs and parts[i].first < end:
            runs[-1].append(i)
        else:
            runs.append([i])
        end = max(end, parts[i].first + parts[i].grad.shape[0])
    return [[parts[i] for i in sorted(run)] for run in runs]


def _segment(part: ProjectPart) -> list[int]:
    grad, columns = part.grad, part.columns
    assert columns is not None
    return [grad.data_ptr(), columns.data_ptr(), grad.shape[1], part.first, *grad.stride(), *columns.stride()]


@lru_cache(maxsize=256)
def _programs(rows: tuple[tuple[int, int], ...], block: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Blocks of channels, and which parts each sums.

    They follow from shapes, so they are made once and stay on the device.

    Args:
        rows: of each part its first row of the output, and how many.
        block: most channels of a program.
        device: where they go.

    Returns:
        Of each program the first row, how many, and its range in the list of parts that is returned as well.
    """
    programs: list[list[int]] = []
    order: list[int] = []
    edges = sorted({edge for first, count in rows for edge in (first, first + count)})
    starts: dict[int, list[int]] = {}
    for i, (first, _) in enumerate(rows):
        starts.setdefault(first, []).append(i)
    alive: list[int] = []
    for low, high in pairwise(edges):
        alive = sorted([i for i in alive if sum(rows[i]) > low] + starts.get(low, []))
        if not alive:
            continue
        begin = len(order)
        order += alive
        programs += [[a, min(block, high - a), begin, len(order)] for a in range(low, high, block)]
    return to_device(programs, torch.int64, device), order


def _cost(parts: Sequence[ProjectPart], out: Tensor, squares: Tensor | None) -> Cost:
    """Programs of one column of blocks share a P, which the second-level cache then holds."""
    channels, rank = sum(part.grad.shape[0] for part in parts), out.shape[1]
    columns = {id(part.columns): part.columns.nbytes for part in parts if part.columns is not None}
    read = sum(part.grad.nbytes for part in parts) + sum(columns.values())
    written = channels * (rank + (squares is not None)) * 4
    work = sum(2 * part.grad.numel() * rank * (_SPLIT[part.grad.dtype] if rank > 1 else 1) for part in parts)
    norms = sum(2 * part.grad.numel() for part in parts) if squares is not None else 0
    return Cost("project", read, written, work if rank > 1 else 0, norms + (work if rank == 1 else 0))


def _nothing(parts: Sequence[ProjectPart], out: Tensor, squares: Tensor | None) -> None:
    """Zero the rows of which there are no elements: parts without an inner extent."""
    for part in parts:
        if part.grad.shape[0] and not part.grad.shape[1]:
            rows = slice(part.first, part.first + part.grad.shape[0])
            if not any(
                p.grad.numel() and p.first < rows.stop and p.first + p.grad.shape[0] > rows.start for p in parts
            ):
                out[rows].zero_()
                if squares is not None:
                    squares[rows].zero_()
