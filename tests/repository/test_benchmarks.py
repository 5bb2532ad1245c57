"""The benchmark runs, its table is complete, and state has the size that the formula says. No times are asserted."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ..ranks import run_python

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "benchmarks" / "step_time.py"), *arguments, timeout=300)


def table(text: str) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_row_is_there_and_state_is_what_the_formula_says(tmp_path: Path, dtype: str) -> None:
    done = run(
        *("--shapes", "tiny", "--rank", "16", "--dtype", dtype, "--rounds", "2", "--steps", "1"),
        *("--write", "tiny", "--results", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "tiny.md").read_text(encoding="utf-8")
    assert text in done.stdout
    rows = table(text)
    products = "matrix products of rank 16, nothing else"
    copies = "plain copies of the least bytes that APOLLO moves"
    assert {"AdamW (torch, fused)", "SGD (torch)", "APOLLO-Mini", "APOLLO rank 16", products, copies} <= set(rows)
    assert float(rows[copies][8]) == 1.0
    for name, cells in rows.items():
        assert re.fullmatch(r"[\d.]+", cells[0]), f"{name} has no time"
        if cells[7]:
            state, formula = (float(cells[i].removesuffix(" MB").replace(",", "")) for i in (6, 7))
            assert state == pytest.approx(formula, rel=0.02, abs=0.006), name
    assert rows["APOLLO rank 16"][2] and rows["APOLLO rank 16"][3], "redraws are not measured"
    for wanted in ("Date:", "Machine:", "Versions:", "Command:"):
        assert wanted in text


@pytest.mark.parametrize("arguments", [("--shapes", "2B"), ("--rounds", "0"), ("--device", "tpu")])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "error" in done.stderr


@pytest.mark.slow
def test_every_kernel_is_timed(tmp_path: Path) -> None:
    """Where no GPU is, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
    words = ["--shapes=tiny", "--matrices=1", "--vocabulary=50", "--rounds=1", "--calls=1", "--copy=4096"]
    script = str(ROOT / "benchmarks" / "kernel_time.py")
    done = run_python(script, *words, "--write", "tiny", "--results", str(tmp_path), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table((tmp_path / "tiny.md").read_text(encoding="utf-8"))
    names = {name.partition(",")[0] for name in rows}
    assert names == {"project", "moments", "apply", "apply_rows", "adamw", "draw", "draw_signs", "add_up"}
    for name, cells in rows.items():
        assert int(cells[0]) == 1 and float(cells[2]) > 0, name
