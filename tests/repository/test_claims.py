"""``benchmarks/claims.py``: a full step under fake tensors agrees with the planner; the real path runs."""

from __future__ import annotations

import re
import subprocess

import pytest

from ..ranks import run_python
from .test_benchmarks import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "benchmarks" / "claims.py"), *arguments)


def test_the_tracker_and_the_planner_agree() -> None:
    """At a micro-batch whose passes have the peak: the planner does not count how the first step makes state."""
    done = run("13b-ddp", "--recipe", "tiny", "--micro-batch", "16", "--optimizers", "apollo-mini")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = re.findall(r"tracker((?: +[0-9.]+){6})", done.stdout)
    assert len(seen) == 1
    for line in seen:
        weights, gradients, state, *_, total = map(float, line.split())
        assert weights == gradients > state > 0  # bf16 weights, and one copy of their gradients
        assert total > weights + gradients + state


def test_throughput_says_what_fits_and_the_ratio() -> None:
    done = run("throughput")
    assert done.returncode == 0, done.stderr
    assert re.search(r"adamw, fp32 moments +0 +- +needs [0-9.]+ GB", done.stdout)
    assert len(re.findall(r"ratio apollo", done.stdout)) == 2


@pytest.mark.slow
def test_the_real_path_runs_on_a_cpu() -> None:
    done = run("13b-ddp", "--recipe", "tiny", "--optimizers", "apollo-mini", "--device", "cpu", "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"apollo-mini: micro-batch 1, .* tokens/s, loss [0-9.]+ ", done.stdout)
