"""Large tensors in low precision are converted in pieces: the same bits, under layouts whose rows have gaps as well."""

from __future__ import annotations

import pytest
import torch

from apollo_dist.step import elementwise

from ..exactness import test_exact_rounding as rounding
from ..ranks import run_ranks

CASES = [
    ("AdamW, bf16 moments", "ddp", {}),
    ("AdamW, bf16 moments", "fsdp2 dim 1", {}),
    ("SGD", "fsdp2 dim 1", {"stochastic_rounding": False}),
]


def both(rank, world):
    """Whether whole tensors and pieces of at most 7 elements gave other weights, by case."""
    found = []
    for case, layout, more in CASES:
        results = []
        for elements in (1 << 24, 7):
            elementwise._ELEMENTS = elements
            results.append(rounding.train(case, layout, world, **more))
        found.append(results)
    return found


@pytest.mark.slow
def test_pieces_have_the_bits_of_whole_tensors():
    for rank in run_ranks(both, 2):
        for (case, layout, _), (whole, pieces) in zip(CASES, rank, strict=True):
            assert whole.keys() == pieces.keys()
            for name, weight in whole.items():
                assert torch.equal(weight, pieces[name]), (case, layout, name)
