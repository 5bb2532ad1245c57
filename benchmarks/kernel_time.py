"""Each Triton kernel alone on the matrices of a LLaMA: its time, and the share of a plain copy's bandwidth it reaches.

    python benchmarks/kernel_time.py --shapes 7B --write h100-7B-kernels

A kernel's bytes are those that it tells (``apollo_dist.kernels.costs``), the same that ``traffic.py`` counts. The copy
is of 1 GiB, in the same run, in turns with the kernels. Of a product the share of a copy's bandwidth says little where
arithmetic takes longer than reading; its TFLOP/s stand beside it. On a CPU, Triton's interpreter shows that the
benchmark runs, and times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from candidates import RECIPES, matrix_shapes
from launches import instead_of_launches
from measure import machine, seconds_per_call
from torch import Tensor

from apollo_dist.kernels import triton as kernels
from apollo_dist.kernels.costs import Cost
from apollo_dist.kernels.parts import AdamWPart, ApplyPart, ProjectPart, RowsPart
from apollo_dist.kernels.rounding import Rounding
from apollo_dist.projections.quantiles import quantiles

RESULTS = Path(__file__).resolve().parent / "results"
BF16 = torch.bfloat16
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


@dataclass
class Row:
    """One kernel: seconds a call, an entry a round, and what its launches told."""

    name: str
    call: Callable[[], object]
    costs: list[Cost] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def cases(
    shapes: list[tuple[int, int]], rank: int, vocabulary: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches by name, over all matrices at a time; bf16 weights and gradients."""

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).mul_(1e-2).to(dtype)

    # Channels first, as steps have them: a wide matrix comes transposed.
    first = [made(m, n, dtype=BF16) if m >= n else made(m, n, dtype=BF16).t() for m, n in shapes]
    channels = [len(grad) for grad in first]
    starts = [sum(channels[:i]) for i in range(len(channels))]
    coefficients = torch.tensor([[-1e-3, 1.0]], device=device)
    for r in (rank, 1):
        columns = {grad.shape[1]: made(r, grad.shape[1], dtype=BF16).t() for grad in first}
        parts = [
            ProjectPart(grad, columns[grad.shape[1]], start, 0, False)
            for grad, start in zip(first, starts, strict=True)
        ]
        out, squares = made(sum(channels), r), made(sum(channels))
        yield f"project, rank {r}", partial(kernels.project, parts, 1.0, out, squares)
        states = [made(sum(channels), r).abs() for _ in range(3)]
        norms = made(sum(channels)), made(sum(channels))
        yield f"moments, rank {r}", partial(kernels.moments, *states, *norms, **ADAM)
    weights = [torch.zeros_like(grad) for grad in first]
    factors = [made(count).abs() for count in channels]
    for name, how in (("apply", None), ("apply, rounded stochastically", Rounding((1, 2, 3), 1, 0, (1, 1)))):
        given = [
            ApplyPart(weight, grad, by, 0, _of(how, weight))
            for weight, grad, by in zip(weights, first, factors, strict=True)
        ]
        yield name, partial(kernels.apply, given, coefficients)
    del weights
    rows = []
    for (m, n), grad, by in zip(shapes, first, factors, strict=True):
        codes, stored = torch.ones((m, n), dtype=torch.int8, device=device), grad if m >= n else grad.t()
        how = Rounding((1, 2, 3), 1, 0, (n, 1))
        rows.append(RowsPart(codes, made(m, dtype=BF16).abs(), stored, by, int(m >= n), 0, how))
    yield "apply_rows, int8", partial(kernels.apply_rows, rows, coefficients)
    hidden = min(shapes[0])
    flat = [made(vocabulary * hidden, dtype=dtype).abs() for dtype in (BF16, BF16, torch.float32, torch.float32)]
    tensor = AdamWPart(*flat)
    yield "adamw, embedding", partial(kernels.adamw, [tensor], coefficients[0], **ADAM)
    keys, slabs = torch.zeros((8, 5), dtype=torch.int64, device=device), made(8, rank, hidden, dtype=BF16)
    yield "draw, 8 slabs", partial(kernels.draw, keys, quantiles(device), slabs)
    yield "draw_signs, 8 slabs", partial(kernels.draw_signs, keys, slabs)
    numbers = min(1 << 21, sum(m * n for m, n in shapes))  # a bucket of exchange 1
    sent, summed = made(8, numbers), made(numbers)
    yield "add_up, 8 ranks", partial(kernels.add_up, sent, summed)


def _of(how: Rounding | None, weight: Tensor) -> Rounding | None:
    """The rounding of a whole matrix that comes channels first."""
    return None if how is None else how._replace(strides=weight.stride())  # type: ignore[arg-type]


@contextmanager
def told(costs: list[Cost]) -> Iterator[None]:
    """Collect what launches cost."""

    def launch(kernel: Any, grid: Any, device: Any, cost: Callable[[], Cost], *args: Any, **constants: Any) -> None:
        costs.append(cost())

    with instead_of_launches(launch):
        yield


def run(args: argparse.Namespace) -> tuple[list[Row], list[float]]:
    """Measure every kernel, and the copy's seconds a byte, an entry a round."""
    device = torch.device(args.device)
    shapes = matrix_shapes(args.shapes)
    shapes = shapes[: args.matrices or len(shapes)]
    source = torch.zeros(args.copy // 4, device=device)
    target = torch.empty_like(source)
    copies: list[float] = []
    rows = [Row(name, call) for name, call in cases(shapes, args.rank, args.vocabulary, device)]
    for row in rows:
        with told(row.costs):
            row.call()
        row.call()  # compiles
    for _ in range(args.rounds):
        copies.append(seconds_per_call(lambda: target.copy_(source), args.calls, device) / (2 * source.nbytes))
        for row in rows:
            row.times.append(seconds_per_call(row.call, args.calls, device))
    return rows, copies


def report(rows: list[Row], copies: list[float], args: argparse.Namespace, where: str, command: str) -> str:
    """The table in Markdown, with what is needed to read and to repeat it."""
    copy = statistics.median(copies)
    lines = [
        f"# Kernels: LLaMA {args.shapes} matrices, bf16, {args.device}",
        "",
        f"- Date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- Machine: {where}",
        f"- Versions: torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}",
        f"- Command: `{command}`",
        f"- {args.rounds} rounds of {args.calls} calls; a plain copy moves {1e-9 / copy:,.1f} GB/s",
        "",
        "| kernel | launches | GB | ms (median) | GB/s | share of the copy's | TFLOP/s on tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = statistics.median(row.times)
        moved = sum(cost.read + cost.written for cost in row.costs)
        products = sum(cost.tensor_core for cost in row.costs)
        # Of the copy in the same round, whatever else slows both.
        share = statistics.median(moved * c / t for c, t in zip(copies, row.times, strict=True))
        cells = [row.name, f"{len(row.costs)}", f"{moved / 1e9:.3f}", f"{1e3 * seconds:.3f}"]
        cells += [f"{moved / seconds / 1e9:,.1f}", f"{100 * share:.0f} %"]
        cells += [f"{products / seconds / 1e12:.1f}" if products else ""]
        lines.append("| " + " | ".join(cells).rstrip() + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", choices=RECIPES, default="7B", help="whose transformer matrices (default 7B)")
    parser.add_argument("--matrices", type=int, help="only so many of them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, help="of the projections (default: the recipe's)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding (default 32000)")
    parser.add_argument("--rounds", type=int, default=11, help="medians are taken over them (default 11)")
    parser.add_argument("--calls", type=int, default=3, help="consecutive calls timed in a round (default 3)")
    parser.add_argument(
        "--copy", type=int, default=1 << 30, metavar="BYTES", help="that the copy reads (default 1 GiB)"
    )
    parser.add_argument("--write", metavar="NAME", help="write the table to benchmarks/results/NAME.md too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder for --write")
    args = parser.parse_args(arguments)
    if args.rank is None:
        args.rank = RECIPES[args.shapes][3]
    where = machine(torch.device(args.device))
    command = shlex.join(["python", "benchmarks/kernel_time.py", *(sys.argv[1:] if arguments is None else arguments)])
    rows, copies = run(args)
    text = report(rows, copies, args, where, command)
    print(text)
    if args.write:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"{args.write}.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
