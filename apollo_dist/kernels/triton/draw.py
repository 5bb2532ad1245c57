"""Generate projections: Philox and a table of quantiles, eight rows of a column for each call of Philox; or signs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from .tables import launch

# Columns of one program. It makes all rows of them that one call of Philox gives, each row one contiguous write.
_COLUMNS = 1024
# Rows that one call of Philox makes: 16 bits an entry, or one.
_NORMALS, _SIGNS = 8, 128


@triton.jit
def _draw(keys, table, out, rank, length, BLOCK: tl.constexpr, SIGNS: tl.constexpr):
    slab, call, block = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    key = keys + slab * 5
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    c2, c3, start = tl.load(key + 2).to(tl.uint32), tl.load(key + 3).to(tl.uint32), tl.load(key + 4)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < length
    zero = tl.zeros([BLOCK], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        (start + columns).to(tl.uint32), zero + call.to(tl.uint32), zero + c2, zero + c3, k0, k1
    )
    place = out + slab.to(tl.int64) * rank * length + columns
    if SIGNS:
        for i in tl.static_range(4):
            word = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
            for b in range(tl.minimum(32, rank - call * 128 - i * 32)):
                row = call * 128 + i * 32 + b
                value = 1.0 - 2.0 * ((word >> b) & 1).to(tl.float32)
                tl.store(place + row.to(tl.int64) * length, value.to(tl.bfloat16), mask=inside & (zero + row < rank))
    else:
        for i in tl.static_range(8):
            word = w0 if i < 2 else (w1 if i < 4 else (w2 if i < 6 else w3))
            index = word & 0xFFFF if i % 2 == 0 else word >> 16
            row = call * 8 + i
            value = tl.load(table + index.to(tl.int32))
            tl.store(place + row.to(tl.int64) * length, value, mask=inside & (zero + row < rank))


def draw(keys: Tensor, table: Tensor, out: Tensor) -> None:
    """As ``kernels.reference.draw``, bit for bit, for contiguous ``out`` in bf16."""
    _launch(keys, table, out, _NORMALS, signs=False)


def draw_signs(keys: Tensor, out: Tensor) -> None:
    """As ``kernels.reference.draw_signs``, bit for bit, for contiguous ``out`` in bf16."""
    _launch(keys, out, out, _SIGNS, signs=True)


def _launch(keys: Tensor, table: Tensor, out: Tensor, rows: int, *, signs: bool) -> None:
    slabs, rank, length = out.shape
    if not out.numel():
        return
    grid = (triton.cdiv(length, _COLUMNS), triton.cdiv(rank, rows), slabs)
    # Some 70 integer operations make the words of a call.
    work = slabs * triton.cdiv(rank, rows) * length * 70
    read = keys.nbytes + (0 if signs else table.nbytes)
    launch(
        _draw, grid, out.device, lambda: Cost("draw", read, out.nbytes, other=work),
        keys, table, out, rank, length, BLOCK=_COLUMNS, SIGNS=signs,
    )  # fmt: skip
