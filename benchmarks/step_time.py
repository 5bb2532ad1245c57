"""Time, peak extra memory and state of one optimizer step, ours beside torch's, in one run on the same matrices.

    python benchmarks/step_time.py                                   # 60M shapes, fp32, CPU, two threads
    python benchmarks/step_time.py --shapes 7B --dtype bf16 --device cuda --write h200-7B-bf16

All optimizers step the same weights with the same random gradients, in turns: each round measures each of them once, in
rotating order, so that a machine that slows down slows all alike. For APOLLO two instances are measured, one that never
redraws its projections and one that redraws them at every step; the time reported is
((gap - 1) * plain + redraw) / gap, with both shown. The matrix products of APOLLO's rank alone are measured too: no
implementation takes less, and what they cost beside AdamW's traffic with memory is the machine's affair. The authors'
package apollo-torch joins if it is installed.

Exit status 1 if an optimizer holds 2 % more or less state than its formula says.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from candidates import COPY, NEVER, RECIPES, Candidate, candidates, matrix_shapes, state_bytes
from measure import machine, peak_extra_bytes, seconds_per_call
from torch import nn

import apollo_dist

RESULTS = Path(__file__).resolve().parent / "results"
STATE_TOLERANCE = 0.02
BUSY = 1.5  # a baseline that varies by more than this factor was not alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """One optimizer's measurements; times in seconds, one entry a round."""

    candidate: Candidate
    plain: list[float] = field(default_factory=list)
    redraw: list[float] = field(default_factory=list)
    extra: int = 0
    state: int = 0
    formula: int | None = None

    def per_step(self, gap: int) -> list[float]:
        """Seconds a step in each round, redraws at their true frequency."""
        if not self.redraw:
            return self.plain
        return [((gap - 1) * plain + redraw) / gap for plain, redraw in zip(self.plain, self.redraw, strict=True)]

    def state_is_off(self) -> bool:
        """Whether the state differs from its formula by more than the tolerance."""
        return self.formula is not None and abs(self.state - self.formula) > STATE_TOLERANCE * self.formula


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=RECIPES, default="60M", help="whose transformer matrices (default 60M)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and gradients")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--rank", type=int, help="APOLLO's rank (default: the recipe's)")
    parser.add_argument("--gap", type=int, default=200, help="steps between redraws in the result (default 200)")
    parser.add_argument("--rounds", type=int, default=25, help="rounds; medians are taken over them (default 25)")
    parser.add_argument("--steps", type=int, default=2, help="consecutive steps timed in a round (default 2)")
    parser.add_argument("--write", metavar="NAME", help="write the table to benchmarks/results/NAME.md too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder for --write")
    args = parser.parse_args(arguments)
    for name in ("threads", "gap", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def fill_gradients(params: list[nn.Parameter], seed: int) -> None:
    """New random gradients, of the size that gradients have, in place."""
    generator = torch.Generator(params[0].device).manual_seed(seed)
    for param in params:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.normal_(0.0, 1e-2, generator=generator)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure every candidate."""
    device = torch.device(args.device)
    shapes = matrix_shapes(args.shapes)
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes]
    fill_gradients(params, seed=0)
    rows, timed = [], []
    for candidate in candidates(args.rank):
        row = Row(candidate)
        plain = candidate.make(params, NEVER)
        for _ in range(2):  # state, compiled functions and the first projections come to be here, untimed
            plain.step()
        row.extra = peak_extra_bytes(plain.step, device)
        row.state = state_bytes(plain)
        if candidate.formula is not None:
            row.formula = candidate.formula(shapes, dtype.itemsize)
        rows.append(row)
        timed.append((plain, row.plain))
        if candidate.projected:
            redraw = candidate.make(params, 1)
            for _ in range(2):
                redraw.step()
            timed.append((redraw, row.redraw))
    for number in range(args.rounds):
        fill_gradients(params, seed=number)
        first = number % len(timed)
        for optimizer, times in timed[first:] + timed[:first]:
            times.append(seconds_per_call(optimizer.step, args.steps, device))
    return rows


def size(count: int) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:,.2f} MB"


def ratio(row: Row, base: Row, gap: int) -> float:
    """Median over the rounds of this row's time by the base's in the same round."""
    pairs = zip(row.per_step(gap), base.per_step(gap), strict=True)
    return statistics.median(own / other for own, other in pairs)


def row_text(row: Row, base: Row, copy: Row, gap: int) -> str:
    """One line of the table."""
    times = row.per_step(gap)
    ms = [f"{1e3 * statistics.median(times):.2f}", f"{1e3 * min(times):.2f} to {1e3 * max(times):.2f}"]
    ms += [f"{1e3 * statistics.median(kind):.2f}" if kind else "" for kind in (row.plain, row.redraw)]
    formula = "" if row.formula is None else size(row.formula)
    cells = [row.candidate.name, *ms, f"{ratio(row, base, gap):.2f}", size(row.extra), size(row.state), formula]
    cells.append(f"{ratio(row, copy, gap):.2f}")
    return "| " + " | ".join(cells) + " |"


def report(rows: list[Row], args: argparse.Namespace, where: str, command: str) -> str:
    """The table in markdown, with what is needed to read and to repeat it."""
    shapes = matrix_shapes(args.shapes)
    elements = sum(m * n for m, n in shapes)
    versions = f"apollo_dist {apollo_dist.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    memory = (
        "the CUDA allocator's peak"
        if args.device == "cuda"
        else "the running sum of what torch's allocator reported to the profiler (work space in oneDNN or MKL unseen)"
    )
    copy = next(row for row in rows if row.candidate.name == COPY)
    lines = [
        f"# Optimizer step: LLaMA {args.shapes} matrices, {args.dtype}, {args.device}",
        "",
        f"- Date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- Machine: {where}",
        f"- Versions: {versions}",
        f"- Command: `{command}`",
        f"- {len(shapes)} matrices, {elements:,} elements; {args.threads} CPU threads; "
        f"{args.rounds} rounds of {args.steps} steps",
        "",
        "| optimizer | ms/step (median) | range over rounds | without redraw | with redraw | x fused AdamW "
        "| peak extra in a step | state | state by formula | x copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *[row_text(row, rows[0], copy, args.gap) for row in rows],
        "",
        f"ms/step = (({args.gap} - 1) x without redraw + with redraw) / {args.gap}, both measured in every round; "
        "the ratio is the median of the rounds' ratios. "
        f"Peak extra memory is {memory}, over one step without redraw. "
        "State counts moments and limiter norms; projections are not state. "
        "The copies are of each gradient and each weight: as many bytes as a step must move, which reads gradients "
        "twice, reads weights and writes them.",
    ]
    if max(rows[0].plain) > BUSY * min(rows[0].plain):
        lines += ["", f"**Something else used the machine: {rows[0].candidate.name} alone varies by the range above.**"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and say whether the state has the size it should have."""
    args = options(arguments)
    if args.rank is None:
        args.rank = RECIPES[args.shapes][3]
    torch.set_num_threads(args.threads)
    where = machine(torch.device(args.device))
    command = shlex.join(["python", "benchmarks/step_time.py", *(sys.argv[1:] if arguments is None else arguments)])
    rows = run(args)
    text = report(rows, args, where, command)
    print(text)
    if args.write:
        args.results.mkdir(parents=True, exist_ok=True)
        path = args.results / f"{args.write}.md"
        path.write_text(text, encoding="utf-8")
        print(f"written to {path}")
    off = [row for row in rows if row.state_is_off()]
    for row in off:
        print(f"error: {row.candidate.name} holds {row.state} bytes of state, its formula says {row.formula}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
