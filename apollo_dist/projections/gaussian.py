"""Random projections that every rank can draw alone, in any piece.

``P`` of a matrix is a pure function of (seed, name, refresh): element (k, j) is computed from a counter that
encodes k and j and from a hash of (seed, name, refresh), with the counter-based generator of ``kernels/philox.py``. So
a rank that holds columns a..b of a matrix draws just the slab of ``P`` it needs, no projection is ever sent or saved,
and a run resumed on other hardware draws the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.philox import MASK32, philox_4x32_10, words_of
from ..kernels.transfer import to_device

# How many counters are drawn together: on CPU the int64 temporaries then stay in the cache; on accelerators they are
# 8 MiB each, so that a kernel should have more to do than its launch takes (by what is known of both, not measured).
_COUNTERS = {"cpu": 1 << 17}
_COUNTERS_ACCELERATOR = 1 << 20


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
) -> Tensor:
    """Columns ``start..stop`` of the (rank x size) projection of one matrix, entries N(0, 1/rank).

    A pure function of its arguments: a slab equals the same columns of the whole bit for bit, on every process
    and whatever was drawn before. The underlying integers are bit-exact on every device; the normals come from
    Box-Muller in float64 and are rounded to ``dtype`` last, so that the last-place differences between devices'
    ``log`` and ``cos`` almost never reach a float32.

    Args:
        seed: any integer, the run's seed.
        name: canonical fully qualified name of the matrix.
        refresh: how often the projection was redrawn before, ``(t - 1) // update_proj_gap`` at step t (from 1).
        rank: r, the number of rows.
        size: the length of the projected dimension, min(m, n) of the matrix.
        start, stop: the columns wanted; ``stop=None`` means ``size``.
        dtype: torch.float32 or torch.float64.
        device: where to draw.

    Returns:
        A contiguous tensor of shape (rank, stop - start).

    Raises:
        ValueError: for sizes or ranges that make no sense, or another dtype.
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
    where = torch.device(device)
    return draw(philox_keys(seed, [(name, refresh, start)], where), rank, stop - start, dtype)[0]


def philox_keys(seed: int, slabs: Sequence[tuple[str, int, int]], device: torch.device) -> Tensor:
    """What ``draw`` starts from, (slabs, 5) on ``device``, which nothing waits for.

    Args:
        seed: of the projections.
        slabs: of each the matrix's name, the refresh, and the first column.
        device: where to draw.
    """
    words = [(*_identity(seed, name, refresh), start) for name, refresh, start in slabs]
    return to_device(words, torch.int64, device)


def drawn_together(rank: int, length: int, device: torch.device) -> int:
    """How many slabs of rank x length one set of kernels draws; at least 1."""
    return max(1, _COUNTERS.get(device.type, _COUNTERS_ACCELERATOR) // max(1, math.ceil(rank / 4) * length))


def draw(starts: Tensor, rank: int, length: int, dtype: torch.dtype) -> Tensor:
    """Slabs of several matrices' projections, each as ``gaussian`` returns it, (slabs, rank, length).

    Args:
        starts: what ``philox_keys`` returned.
        rank, length: of each slab.
        dtype: torch.float32 or torch.float64.
    """
    out = torch.empty((starts.shape[0], rank, length), dtype=dtype, device=starts.device)
    chunk = drawn_together(rank, len(starts), starts.device)  # columns of every slab at a time
    for a in range(0, length, chunk):
        b = min(a + chunk, length)
        out[:, :, a:b] = _normals(starts, rank, a, b)
    return out


def _normals(starts: Tensor, rank: int, first: int, last: int) -> Tensor:
    """Columns ``first..last`` of slabs, (slabs, rank, last - first): float64 normals of variance 1/rank.

    The counter is (column, row // 4, two words of hash): one Philox call makes four rows of one column, so the
    columns of a slab need no neighbours. The base normals do not depend on the rank.
    """
    quads = math.ceil(rank / 4)
    # Shapes broadcast, (slabs, quads, columns): the first rounds mix few numbers only.
    k0, k1, c2, c3, start = starts[:, :, None, None].unbind(1)
    columns = start + torch.arange(first, last, device=starts.device)
    rows = torch.arange(quads, device=starts.device)[:, None]
    words = philox_4x32_10((columns, rows, c2, c3), (k0, k1))
    normals = torch.empty((len(starts), quads, 4, last - first), dtype=torch.float64, device=starts.device)
    for pair in (0, 2):
        # 24 bits each, in (0, 1] for the radius (log never sees 0) and in [0, 1) turns for the angle.
        radius = ((words[pair] >> 8) + 1).to(torch.float64).mul_(2.0**-24).log_().mul_(-2.0 / rank).sqrt_()
        angle = (words[pair + 1] >> 8).to(torch.float64).mul_(2.0**-24 * 2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=normals[:, :, pair])
        torch.mul(radius, angle.sin_(), out=normals[:, :, pair + 1])
    return normals.view(len(starts), quads * 4, last - first)[:, :rank]
