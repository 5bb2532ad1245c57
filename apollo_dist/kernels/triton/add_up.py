"""Sums over ranks, in rank order, of what they sent: one pass for any number of ranks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost
from .tables import launch

_BLOCK = 2048


@triton.jit
def _add_up(parts, out, world, stride, numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numbers
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(world):
        acc += tl.load(parts + tl.cast(k, tl.int64) * stride + at, mask=mask, other=0.0)
    tl.store(out + at, acc, mask=mask)


def add_up(parts: Tensor, out: Tensor) -> None:
    """As ``kernels.reference.add_up``; fp32."""
    world, numbers = parts.shape
    if not numbers:
        return
    launch(
        _add_up, (triton.cdiv(numbers, _BLOCK),), out.device,
        lambda: Cost("add_up", parts.nbytes, out.nbytes, other=parts.numel()),
        parts, out, world, parts.stride(0), numbers, BLOCK=_BLOCK,
    )  # fmt: skip
