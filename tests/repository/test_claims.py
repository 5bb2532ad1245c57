"""``benchmarks/claims.py``: a full step under fake tensors agrees with the planner; the real path runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from apollo_dist.pretrain.model import deferred_model
from apollo_dist.pretrain.settings import load_settings

from ..ranks import run_python
from .test_benchmarks import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "benchmarks" / "claims.py"), *arguments)


def tracked(recipe: str, optimizer: str) -> tuple[list[float], str]:
    """The tracker's row, of weights, gradients, state, activations, temporary and total, and all that was printed."""
    pytest.importorskip("triton")
    done = run("13b-ddp", "--recipe", recipe, "--optimizers", optimizer)
    assert done.returncode == 0, done.stdout + done.stderr
    (seen,) = re.findall(r"tracker((?: +[0-9.]+){6})", done.stdout)
    return [float(word) for word in seen.split()], done.stdout


def test_the_tracker_and_the_planner_agree_on_apollo(tmp_path: Path) -> None:
    """With few tokens, so that most of the memory is the optimizer's state.

    Steps on CUDA need no copies, and the first one has each state once.
    """
    recipe = (ROOT / "apollo_dist" / "pretrain" / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
    wide = recipe.replace("vocab_size: 256", "vocab_size: 8192").replace("sequence_length: 256", "sequence_length: 16")
    (tmp_path / "wide.yaml").write_text(wide, encoding="utf-8")
    (weights, gradients, state, *_, total), _ = tracked(str(tmp_path / "wide.yaml"), "apollo")
    assert weights == gradients > 0 and state > 2 * weights  # bf16 weights, and one copy of their gradients
    assert total > weights + gradients + state


@pytest.mark.slow
def test_the_tracker_and_the_planner_agree_on_adamw() -> None:
    (weights, gradients, state, *_, total), told = tracked("tiny", "adamw")
    assert weights == gradients > 0 and state == pytest.approx(2 * weights, abs=0.001)  # moments in bf16
    assert total > weights + gradients + state
    assert "  foreach   " in told


@pytest.mark.slow
def test_throughput_says_what_fits_and_the_ratio() -> None:
    done = run("throughput")
    assert done.returncode == 0, done.stderr
    assert re.search(r"adamw, fp32 moments +0 +- +needs [0-9.]+ GB", done.stdout)
    # The paper's micro-batches, 4 and 16, are those of torch's default DDP.
    trainer, default = done.stdout.split("torch's default")
    assert re.search(r"adamw, bf16 moments +14 +8 ", trainer) and re.search(r"apollo, fp32 moments +28 +16 ", trainer)
    assert re.search(r"adamw, bf16 moments +6 +4 ", default) and re.search(r"apollo, fp32 moments +19 +16 ", default)
    assert len(re.findall(r"ratio apollo.*, with a step for each micro-batch [0-9.]+", done.stdout)) == 4
    assert len(re.findall(r"3\.00 where gradients travel at [0-9]+ GB/s", default)) == 2


def test_the_roofline_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from roofline import BANDWIDTH, LINK, Roofline

    config = load_settings(["--recipe", "tiny", "--optimizer", "adamw", "--sequence_length", "16"]).config
    numbers = sum(p.numel() for p in deferred_model(config.model, config.sequence_length).parameters())
    row = Roofline.of(config, 1, 1000)
    # Few tokens: reading the weights takes longer than the arithmetic.
    assert row.one_pass == pytest.approx(2 * 3 * 2 * numbers / BANDWIDTH)
    assert row.reduce == pytest.approx(1.75 * 2 * numbers / LINK)
    assert row.update == pytest.approx((3 * 2 * numbers + 2000) / BANDWIDTH)
    assert row.tokens_per_s(2) == pytest.approx(32 / (2 * row.one_pass + row.reduce + row.update))
    # Four times the micro-batch in twice the time: a reduction of r makes it 3 (2 + r) = 4 (1 + r), for r = 2.
    small, large = Roofline(4, 256, 1.0, 0.0, 0.0), Roofline(16, 256, 2.0, 0.0, 0.0)
    assert large.reduction_for(3.0, small) == pytest.approx(2.0)
    assert large.reduction_for(4.0, small) is None


@pytest.mark.slow
def test_the_tracker_and_the_planner_agree_on_int8() -> None:
    """Weights of one byte, and one gradient at a time."""
    pytest.importorskip("triton")
    pytest.importorskip("torchao")
    done = run("7b-12gb", "--recipe", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    (seen,) = re.findall(r"tracker((?: +[0-9.]+){6})", done.stdout)
    weights, gradients, *_ = map(float, seen.split())
    assert weights == 0.001 and gradients == 0.0  # GB, rounded


@pytest.mark.slow
def test_the_real_path_runs_on_a_cpu() -> None:
    done = run("13b-ddp", "--recipe", "tiny", "--optimizers", "apollo-mini", "--device", "cpu", "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"apollo-mini: micro-batch 1, .* tokens/s, loss [0-9.]+ ", done.stdout)
