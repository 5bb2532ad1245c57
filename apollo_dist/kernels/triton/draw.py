"""Generate projections: Philox and a table of quantiles, eight rows of a column for each call of Philox."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Columns of one program. It makes eight rows of them, each row one contiguous write.
_COLUMNS = 1024


@triton.jit
def _draw(keys, table, out, rank, length, octets, BLOCK: tl.constexpr):
    slab, octet, block = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    key = keys + slab * 5
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    c2, c3, start = tl.load(key + 2).to(tl.uint32), tl.load(key + 3).to(tl.uint32), tl.load(key + 4)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < length
    zero = tl.zeros([BLOCK], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        (start + columns).to(tl.uint32), zero + octet.to(tl.uint32), zero + c2, zero + c3, k0, k1
    )
    place = out + slab.to(tl.int64) * rank * length + columns
    for i in tl.static_range(8):
        word = w0 if i < 2 else (w1 if i < 4 else (w2 if i < 6 else w3))
        index = word & 0xFFFF if i % 2 == 0 else word >> 16
        row = octet * 8 + i
        value = tl.load(table + index.to(tl.int32))
        tl.store(place + row.to(tl.int64) * length, value, mask=inside & (zero + row < rank))


def draw(keys: Tensor, table: Tensor, out: Tensor) -> None:
    """As ``kernels.reference.draw``, bit for bit."""
    slabs, rank, length = out.shape
    if not out.numel():
        return
    octets = -(-rank // 8)
    grid = (triton.cdiv(length, _COLUMNS), octets, slabs)
    _draw[grid](keys, table, out, rank, length, octets, BLOCK=_COLUMNS)
