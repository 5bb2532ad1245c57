"""Random projections that every rank can generate alone, in any piece.

``P`` of a matrix is a pure function of (seed, name, refresh): element (k, j) is computed from a counter that
encodes k and j and from a hash of (seed, name, refresh), with the counter-based generator of ``kernels/philox.py``. So
a rank that holds columns a..b of a matrix generates just the slab of ``P`` it needs, no projection is ever sent or
saved, and a run resumed on other hardware generates the same ones.

Entries are bf16 numbers of mean 0 and variance 1, whatever dtype they are stored in: normals by table
(``quantiles.py``), or signs. So every device and dtype has the same bits, and tensor cores multiply them exactly. What
APOLLO calls P has variance 1/r: the factor 1/sqrt(r) goes into R = G P^T, where the step has summed it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.philox import MASK32, words_of
from ..kernels.table import Kernels, torch_kernels
from ..kernels.transfer import to_device
from .quantiles import quantiles
from .slices import scale_of

# Distributions of the entries, and how many rows of a column one call of Philox makes: 16 bits an entry, or one.
GAUSSIAN, RADEMACHER = "gaussian", "rademacher"
_ROWS = {GAUSSIAN: 8, RADEMACHER: 128}
KINDS = tuple(_ROWS)
# How many calls of Philox are made together: on CPU the int64 temporaries then stay in the caches. torch gives a thread
# at least 32768 elements of an operation, so with fewer for each all but one would idle. On accelerators temporaries
# are 8 MiB each: a kernel should have more to do than its launch takes (by what is known of both, not measured).
_COUNTERS, _COUNTERS_THREAD, _MOST_THREADS = 1 << 14, 1 << 15, 8
_COUNTERS_ACCELERATOR = 1 << 20
# Of a kernel without temporaries: 64 MiB of bf16 numbers, which a group of matrices then needs for a moment.
_COUNTERS_TOGETHER = 1 << 22


def _identity(seed: int, name: str, refresh: int) -> tuple[int, int, int, int]:
    """128 bits that stand for (seed, name, refresh): two words of key, two of counter."""
    return words_of(f"apollo_dist projection\0{seed}\0{refresh}\0{name}")


def gaussian(
    seed: int,
    name: str,
    refresh: int,
    rank: int,
    size: int,
    start: int = 0,
    stop: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: str = GAUSSIAN,
) -> Tensor:
    """Columns ``start..stop`` of the (rank x size) projection of one matrix, entries of variance 1/rank.

    A pure function of its arguments: a slab equals the same columns of the whole bit for bit, on every process and
    device and whatever was generated before. Each entry is a bf16 number times 1/sqrt(rank), rounded to ``dtype`` once.

    Args:
        seed: any integer, the run's seed.
        name: canonical fully qualified name of the matrix.
        refresh: how often the projection was redrawn before, ``(t - 1) // update_proj_gap`` at step t (from 1).
        rank: r, the number of rows.
        size: the length of the projected dimension, min(m, n) of the matrix.
        start, stop: the columns wanted; ``stop=None`` means ``size``.
        dtype: torch.float32 or torch.float64.
        device: where to generate.
        kind: "gaussian" for normal entries, "rademacher" for signs.

    Returns:
        A contiguous tensor of shape (rank, stop - start).

    Raises:
        ValueError: for sizes or ranges that make no sense, or another dtype or kind.
    """
    stop = size if stop is None else stop
    if rank < 1 or size < 0 or refresh < 0:
        raise ValueError(f"rank must be >= 1, size and refresh >= 0; got rank={rank}, size={size}, refresh={refresh}")
    if size > MASK32:
        raise ValueError(f"size must fit 32 bits, got {size}")
    if not 0 <= start <= stop <= size:
        raise ValueError(f"need 0 <= start <= stop <= size, got start={start}, stop={stop}, size={size}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if kind not in _ROWS:
        raise ValueError(f"kind must be one of {', '.join(_ROWS)}, got {kind!r}")
    where = torch.device(device)
    entries = draw(philox_keys(seed, [(name, refresh, start)], where), rank, stop - start, torch.float64, kind)[0]
    return entries.mul_(scale_of(rank)).to(dtype).contiguous()


def philox_keys(seed: int, slabs: Sequence[tuple[str, int, int]], device: torch.device) -> Tensor:
    """What ``draw`` starts from, (slabs, 5) on ``device``, which nothing waits for.

    Args:
        seed: of the projections.
        slabs: of each the matrix's name, the refresh, and the first column.
        device: where to generate.
    """
    words = [(*_identity(seed, name, refresh), start) for name, refresh, start in slabs]
    return to_device(words, torch.int64, device)


def drawn_together(
    rank: int, length: int, device: torch.device, kind: str = GAUSSIAN, kernels: Kernels | None = None
) -> int:
    """How many slabs of rank x length one set of kernels generates; at least 1."""
    calls = math.ceil(rank / _ROWS[kind]) * length
    most = _COUNTERS_ACCELERATOR
    if kernels is not None and kernels.together:
        most = _COUNTERS_TOGETHER
    elif device.type == "cpu":
        threads = min(torch.get_num_threads(), _MOST_THREADS)
        most = _COUNTERS if threads == 1 else threads * _COUNTERS_THREAD
    return max(1, most // max(1, calls))


def draw(
    starts: Tensor, rank: int, length: int, dtype: torch.dtype, kind: str = GAUSSIAN, kernels: Kernels | None = None
) -> Tensor:
    """Slabs of several matrices' projections, (slabs, rank, length), without the factor 1/sqrt(rank).

    In memory torch's kernels make P^T of each, (length, rank), as a product on CPU takes it; others P.

    Args:
        starts: what ``philox_keys`` returned.
        rank, length: of each slab.
        dtype: that holds bf16 numbers: torch.bfloat16, torch.float32 or torch.float64.
        kind: "gaussian" or "rademacher".
        kernels: that generate it; None for torch's.
    """
    kernels = torch_kernels() if kernels is None else kernels
    if kernels.together:
        out = torch.empty((starts.shape[0], rank, length), dtype=dtype, device=starts.device)
        _write(starts, out, kind, kernels)
        return out
    transposed = torch.empty((starts.shape[0], length, rank), dtype=dtype, device=starts.device)
    chunk = drawn_together(rank, len(starts), starts.device, kind)  # columns of every slab at a time
    for a in range(0, length, chunk):
        keys = starts if a == 0 else torch.cat([starts[:, :4], starts[:, 4:] + a], dim=1)
        _write(keys, transposed[:, a : a + chunk].transpose(1, 2), kind, kernels)
    return transposed.transpose(1, 2)


def _write(keys: Tensor, out: Tensor, kind: str, kernels: Kernels) -> None:
    if kind == GAUSSIAN:
        kernels.draw(keys, quantiles(keys.device, out.dtype), out)
    else:
        kernels.draw_signs(keys, out)
