"""``benchmarks/traffic.py``: the counter against sums by hand, and a table whose numbers hold together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def counted(work):
    from counting import Count

    with Count() as counter:
        work()
    return counter.traffic


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_reads_and_writes_are_those_of_the_schema():
    a, b, half = meta(10, 20), meta(10, 20), meta(10, 20, dtype=torch.bfloat16)
    cases = [
        (lambda: a + b, 2 * 800, 800),
        (lambda: a.add_(b), 2 * 800, 800),
        (lambda: a.copy_(half), 400, 800),  # what is overwritten is not read
        (lambda: a.zero_(), 0, 800),
        (lambda: a.new_zeros(5), 0, 20),
        (lambda: meta(10, 30).addmm_(a, meta(20, 30), beta=0), 800 + 2400, 1200),
        (lambda: meta(10, 30).addmm_(a, meta(20, 30)), 1200 + 800 + 2400, 1200),
        (lambda: torch.add(a, b, out=b), 800 + 800, 800),
        (lambda: a + meta(1, 1).expand(10, 20), 800 + 4, 800),
        (lambda: a.mul_(meta(10, 1)), 800 + 40, 800),
        (lambda: torch._foreach_add_([a, b], [b, a]), 4 * 800, 2 * 800),
    ]
    for number, (work, read, written) in enumerate(cases):
        traffic = counted(work)
        assert (traffic.launches, traffic.read, traffic.written) == (1, read, written), number


def test_views_allocations_and_the_host_cost_nothing():
    a = meta(4, 6)
    traffic = counted(lambda: (a[1:3], a.t(), torch.empty_like(a), torch.ones(3)))
    assert traffic.launches == traffic.bytes == 0
    assert counted(lambda: torch.ones(3).to("meta")).written == 12


def test_products_by_kind_and_memory():
    a, b = meta(10, 20), meta(20, 30)
    traffic = counted(lambda: torch.mm(a, b))
    assert (traffic.fp32_products, traffic.tensor_core, traffic.other) == (2 * 10 * 20 * 30, 0, 0)
    assert traffic.peak == 10 * 30 * 4
    traffic = counted(lambda: torch.mm(a.bfloat16(), b.bfloat16()))
    assert (traffic.fp32_products, traffic.tensor_core) == (0, 2 * 10 * 20 * 30)
    assert traffic.peak == 2 * (10 * 20 + 20 * 30 + 10 * 30)

    def one_after_the_other():
        for _ in range(3):
            meta(100)

    assert counted(one_after_the_other).peak == 400


def test_the_table_is_whole(tmp_path, capsys):
    import traffic

    file = tmp_path / "counts.json"
    given = ["--shapes", "60M", "--layouts", "whole", "--dtypes", "bf16", "--json", str(file)]
    assert traffic.main(given) == 0
    apollo, mini = rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["optimizer"] for row in rows] == ["apollo", "mini"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 60M")]
    assert len(lines) == 2
    # 8 layers of 4 x 512 x 512 + 3 x 512 x 1376; embeddings, head and norms are AdamW's.
    matrices, rest = 8 * (4 * 512 * 512 + 3 * 512 * 1376), 2 * 32000 * 512 + 17 * 512
    for row in rows:
        assert row["floor"] == matrices * 8 + rest * 22
        assert row["adamw"] == (matrices + rest) * 14 + 4  # and the count of steps
        assert row["bytes"] == row["read"] + row["written"] > row["floor"]
        assert row["A100_ms"] > row["H100_ms"] >= 0.999999 * 1e3 * row["bytes"] / 3.35e12
    products = 8 * 2 * 128 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert apollo["fp32_products"] + apollo["tensor_core"] == products
    assert mini["launches"] == sum(launches for launches, _ in mini["by_name"].values())


# Launches, times the floor, new memory in GB: what a step of Triton's kernels may take at most.
BOUNDS = [
    ("whole", 1, "bf16", "apollo", 90, 1.20, 0.4),
    ("whole", 1, "bf16", "mini", 55, 1.01, 0.05),
    ("whole", 1, "int8", "apollo", 90, 1.25, 0.4),
    ("whole", 1, "int8", "mini", 55, 1.01, 0.05),
    ("whole", 1, "fp32", "apollo", 90, 1.11, 0.4),
    ("whole", 1, "fp32", "mini", 55, 1.01, 0.05),
    ("zero2", 8, "bf16", "apollo", 50, 1.20, 0.3),
    ("zero2", 8, "bf16", "mini", 55, 1.01, 0.02),
    ("fsdp2", 8, "bf16", "apollo", 100, 1.51, 0.45),
    ("fsdp2", 8, "bf16", "mini", 100, 1.06, 0.02),
]


@pytest.mark.parametrize(("layout", "world", "dtypes", "optimizer", "launches", "times", "memory"), BOUNDS)
def test_a_step_of_tritons_kernels_stays_within_its_bounds(layout, world, dtypes, optimizer, launches, times, memory):
    """LLaMA-7B, embeddings and head included, redrawing at every step."""
    pytest.importorskip("triton")
    if dtypes == "int8":
        pytest.importorskip("torchao", reason="torchao is an extra: pip install 'apollo-dist[quantized]'")
    import traffic

    row = traffic.count(traffic.Case("7B", layout, world, dtypes, optimizer), "triton")
    counted = row.traffic
    assert counted.launches <= launches
    assert counted.bytes <= times * row.floor
    assert counted.peak <= memory * 1e9
    assert counted.fp32_products <= 0.01 * (counted.tensor_core + counted.fp32_products + counted.other)


def test_launches_do_not_grow_with_depth():
    """Nearly so: R of more channels is reduced in more chunks."""
    pytest.importorskip("triton")
    import traffic

    small, large = (traffic.count(traffic.Case(size, "whole", 1, "bf16", "apollo"), "triton") for size in ("7B", "13B"))
    assert large.traffic.launches <= 1.5 * small.traffic.launches
