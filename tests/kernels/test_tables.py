"""What kernels promise the compiler about memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
from apollo_dist.kernels.triton import tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLAT = torch.zeros(4096, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize(
    ("tensors", "unit", "aligned"),
    [
        ([FLAT[:1024].view(16, 64)], 2, True),
        ([FLAT[:1024].view(16, 64).t()], 1, True),
        ([FLAT[8:1032].view(16, 64)], 2, True),
        ([FLAT[1:1025].view(16, 64)], 2, False),  # an address
        ([FLAT[:1024].view(16, 64)[:, :60]], 2, False),  # where rows end
        ([FLAT[:1040].view(16, 65)[:, :64]], 2, False),  # where rows begin
        ([FLAT[:1024].view(16, 64)[:, ::2]], 0, False),
        ([FLAT[:60].view(60, 1)], 2, False),
        ([FLAT[:64].view(1, 64)], 2, True),  # of which no second row begins
        ([FLAT[:1024].view(16, 64), FLAT[1024:2048].view(16, 64).float()], 2, True),
        ([FLAT[:1024].view(16, 64), FLAT[1:1025].view(16, 64)], 2, False),
        ([FLAT[:1024].view(16, 64), FLAT[:1024].view(64, 16).t()], 0, False),
    ],
)
def test_only_what_is_aligned_is_called_so(tensors, unit, aligned):
    """A GPU ends a program that reads a vector across its boundary; Triton's interpreter does not see it."""
    assert tables.layout(*tensors) == (unit, aligned)
