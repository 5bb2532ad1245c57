"""Normal numbers by table: 65,536 quantiles of N(0, 1), each a bf16 number, indexed by 16 random bits.

Entry i is ndtri((i + 0.5) / 65536), rounded to bf16. A table takes no transcendental function at run time, so every
device generates the same bits; and a bf16 factor loses nothing in a product on tensor cores. Mean 0, variance 0.99999,
kurtosis 2.999, largest value 4.31.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.transfer import moved

ENTRIES = 1 << 16


@lru_cache(maxsize=16)
def quantiles(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The table, (65536,) on ``device``, its bf16 numbers stored in ``dtype``; computed on the CPU, once for each."""
    middle = (torch.arange(ENTRIES // 2, ENTRIES, dtype=torch.float64, device="cpu") + 0.5) / ENTRIES
    upper = torch.special.ndtri(middle).to(torch.bfloat16)
    # Mirrored, and not computed for the lower half, so that the table is symmetric to the bit.
    return moved(torch.cat([-upper.flip(0), upper]).to(dtype), device)
