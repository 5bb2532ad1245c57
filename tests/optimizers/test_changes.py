"""Parameters that are frozen, trained and frozen again take the trajectory of one process, on every engine that can."""

from __future__ import annotations

from typing import Any

import pytest

from ..judge import assert_small
from ..ranks import run_ranks
from .change_runs import cases

# In float64; rounding as in test_exact_torch.py.
TOLERANCE = 1e-9


def check(results: list[dict[str, Any]]) -> None:
    for found in results:
        if "ddp frozen" in found:
            error = found.pop("ddp frozen")
            assert "layers.0." in error, error
            assert "wrap the model again" in error, error
            left_out, frozen = found.pop("bytes")
            assert left_out == frozen
        for case, errors in found.items():
            assert_small(case, errors, TOLERANCE)


def test_in_one_process(tmp_path):
    check(run_ranks(cases, 1, ("plain", "inside plain"), str(tmp_path)))


@pytest.mark.slow
def test_on_two_ranks(tmp_path):
    check(run_ranks(cases, 2, ("ddp", "fsdp2", "inside", "fsdp1 full", "fsdp1 one flat"), str(tmp_path)))


@pytest.mark.slow
def test_on_four_ranks(tmp_path):
    check(run_ranks(cases, 4, ("fsdp2", "hsdp", "inside", "fsdp1 full"), str(tmp_path)))
