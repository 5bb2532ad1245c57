"""The kernels compile for an A100 and an H100, and their machine code is what their files promise; no GPU is needed.

Most other tests of kernels run in Triton's interpreter, which never meets the compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..timeouts import allowed

pytest.importorskip("triton.backends.nvidia", reason="Triton is an extra: pip install 'apollo-dist[triton]'")

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a program may have: of an sm_80 kernel what smaller GPUs of its generation have.
SHARED = {80: 99 << 10, 90: 227 << 10}
# Bytes of a thread's stack: a few numbers, which stay in the cache. A tile that is too large takes thousands.
STACK = 160
# Narrow accesses of small tables, factors and norms. Gradients read so would be dozens more.
NARROW = 40


@pytest.mark.slow
def test_memory_is_accessed_in_wide_vectors_and_tiles_fit_into_registers(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    script = str(ROOT / "benchmarks" / "compiled.py")
    words = [sys.executable, script, "--targets", *map(str, SHARED), "--json", str(output)]
    words += ["--ranks", "256", "1", "--gradients", "bf16", "fp32"]  # fp16 and rank 128 are as these
    # A process of its own: once Triton is loaded with its interpreter, it does not compile.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=allowed(300))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert len(rows) == 2 * len({row["case"] for row in rows}) > 45
    for row in rows:
        case = row["case"]
        assert row["stack"] <= STACK, row
        assert row["shared"] <= SHARED[row["target"]], row
        assert row["wide"] >= 4, row
        assert row["narrow"] <= NARROW or case == "draw", row  # whose entries are looked up one by one
        if case.startswith("project, rank") and "rank 1," not in case:
            assert row["tensor_core"] > 0, row
        if case.startswith("apply, "):
            assert row["fused"] == 0, row  # weights are rounded as by torch's operations
