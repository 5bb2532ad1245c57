"""Bytes, launches and arithmetic of one optimizer step, counted: the same on every machine, and no GPU is needed.

    python benchmarks/traffic.py                                     # everything, some minutes
    python benchmarks/traffic.py --shapes 7B --layouts whole --dtypes bf16 --json traffic.json

The real step runs on tensors of the meta device, and every operation's tensors are counted (``counting.py`` says how).
Beside the counts stand:

- the floor: what any implementation must move. The gradient of a low-rank matrix is read twice (once for the norms that
  scale it, once to update with it) and its weight read and written once; an element of AdamW's is read with its
  gradient, weight and two fp32 moments, and all but the gradient written.
- torch's fused AdamW on the same elements, with moments in the weights' dtype, counted alike; beside INT8 weights
  (those of the blocks' matrices, with a scale a row) on bf16 weights.
- the authors' package by formula, not counted: in the weights' dtype, and one pass after the other, R = P G reads G,
  U = s G reads G and writes U, its norm reads U, the limiter reads and writes U, the update reads W and U and writes W:
  nine passes over a matrix; AdamW's part as the floor has it.
- milliseconds, which are computed and not measured: bytes over the memory bandwidth of a data sheet plus products over
  its arithmetic, with kernels one after the other. Traffic of a network is not in them.

Projections are redrawn as ``cache_projection="auto"`` does on accelerators. Kernels are Triton's, as
``kernels="auto"`` takes them on CUDA devices; ``--kernels torch`` counts torch's operations instead. A projection
counts as read once a launch, since the second-level cache holds it for the programs that follow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from counting import Count, Traffic
from layouts import LAYOUTS, adamw_step, make_step, one_rank

from apollo_dist.planning.fake import meta_model
from apollo_dist.pretrain.config import ModelConfig

RESULTS = Path(__file__).resolve().parent / "results" / "traffic.md"
# hidden, ffn, layers, heads and APOLLO's rank, as in the trainer's recipes.
SIZES = {
    "60M": (512, 1376, 8, 8, 128),
    "1B": (2048, 5461, 24, 32, 256),
    "7B": (4096, 11008, 32, 32, 256),
    "13B": (5120, 13824, 40, 40, 256),
}
VOCABULARY = 32000
# Of weights and gradients.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
    "int8": (torch.int8, torch.bfloat16),
}
OPTIMIZERS = ("apollo", "mini")
# Bytes a second; operations a second of fp32 without and bf16 with tensor cores: NVIDIA's data sheets, SXM, 80 GB.
GPUS = {"A100": (2.039e12, 19.5e12, 312e12), "H100": (3.35e12, 66.9e12, 989e12)}


@dataclass(frozen=True)
class Case:
    """What is counted: a model of ``SIZES``, a layout, the ranks that divide it, dtypes, and the optimizer."""

    size: str
    layout: str
    world: int
    dtypes: str
    optimizer: str


@dataclass(frozen=True)
class Row:
    """A case, its counts, and what they are compared with, in bytes."""

    case: Case
    traffic: Traffic
    floor: int
    adamw: int
    authors: int

    def milliseconds(self, gpu: str) -> float:
        """What a data sheet makes of the counts."""
        bandwidth, fp32, tensor_cores = GPUS[gpu]
        counted = self.traffic
        products = counted.fp32_products / fp32 + counted.tensor_core / tensor_cores
        return 1e3 * (counted.bytes / bandwidth + products)


def count(case: Case, kernels: str) -> Row:
    """Count the third step of a case."""
    hidden, ffn, layers, heads, rank = SIZES[case.size]
    weights, grads = DTYPES[case.dtypes]
    options: dict[str, Any] = {"rank": rank, "scale_type": "channel", "cache_projection": "auto"}
    options["kernels"] = kernels
    if case.optimizer == "mini":
        options |= {"rank": 1, "scale_type": "tensor", "scale": 128.0}
    with one_rank(case.layout, case.world):
        model = meta_model(ModelConfig(VOCABULARY, hidden, ffn, layers, heads))
        take, elements, _ = make_step(model, case.layout, case.world, weights, grads, options)
        take()
        take()
        counter = Count()
        with counter:
            take()
    adamw = Count()
    others = torch.bfloat16 if weights == torch.int8 else weights  # of parameters that AdamW updates
    step = adamw_step(sum(elements.values()), others, grads)
    with adamw:
        step()
    w, g = weights.itemsize, grads.itemsize
    rest = elements["rest"] * (2 * others.itemsize + g + 16)
    floor = elements["matrices"] * (2 * w + 2 * g) + rest
    authors = elements["matrices"] * 9 * w + rest
    return Row(case, counter.traffic, floor, adamw.traffic.bytes, authors)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Whole models of all sizes; and one rank's shard of 7B, at 8 ranks, with FSDP2 at 64 ranks as well."""
    for size in args.shapes:
        for layout in args.layouts:
            if layout != "whole" and size != "7B":
                continue
            if layout == "zero1" and "zero2" in args.layouts:
                continue  # ZeRO-1 and 2 hold the same partitions at a step
            for world in [1] if layout == "whole" else [8, 64] if layout == "fsdp2" else [8]:
                for dtypes in args.dtypes:
                    if layout == "fsdp2" and dtypes == "mixed":
                        continue  # FSDP2 gives gradients in the dtype of the weights
                    if layout != "whole" and dtypes == "int8":
                        continue  # only whole models are counted
                    for optimizer in args.optimizers:
                        yield Case(size, layout, world, dtypes, optimizer)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = (
        "| model | layout | ranks | weights, gradients | optimizer | launches | GB | x floor | x AdamW | "
        "apollo-torch by formula, x floor | tensor-core TFLOP | fp32 product TFLOP | other GFLOP | new memory GB | "
        "A100 ms | H100 ms |"
    )
    lines = [head, "|" + "---|" * head.count(" |")]
    for row in rows:
        case, counted = row.case, row.traffic
        kinds = {"bf16": "bf16", "fp32": "fp32", "mixed": "fp32, bf16", "int8": "int8, bf16"}[case.dtypes]
        cells = [
            case.size,
            "zero1, zero2" if case.layout == "zero2" else case.layout,
            str(case.world),
            kinds,
            "APOLLO-Mini" if case.optimizer == "mini" else f"APOLLO {SIZES[case.size][-1]}",
            f"{counted.launches:,}",
            f"{counted.bytes / 1e9:.2f}",
            f"{counted.bytes / row.floor:.2f}",
            f"{counted.bytes / row.adamw:.2f}",
            f"{row.authors / row.floor:.2f}" if case.layout == "whole" and case.dtypes != "int8" else "",
            f"{counted.tensor_core / 1e12:.3f}",
            f"{counted.fp32_products / 1e12:.3f}",
            f"{counted.other / 1e9:.1f}",
            f"{counted.peak / 1e9:.3f}",
            *(f"{row.milliseconds(gpu):.1f}" for gpu in GPUS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def detail(row: Row) -> str:
    """The operations of a case that move most."""
    listed = sorted(row.traffic.by_name.items(), key=lambda item: -item[1][1])[:12]
    return "\n".join(f"    {name:28s} {launches:7,d} {moved / 1e9:10.3f} GB" for name, (launches, moved) in listed)


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    values = {**asdict(row.case), **asdict(row.traffic), "bytes": row.traffic.bytes}
    values |= {"floor": row.floor, "adamw": row.adamw, "authors": row.authors}
    return values | {f"{gpu}_ms": row.milliseconds(gpu) for gpu in GPUS}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in {
        "shapes": SIZES,
        "layouts": LAYOUTS,
        "dtypes": DTYPES,
        "optimizers": OPTIMIZERS,
    }.items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--kernels", choices=["torch", "triton"], default="triton", help="what steps compute with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts as JSON")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name} in benchmarks/results")
    parser.add_argument("--detail", action="store_true", help="print the operations that move most")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Count, print, write."""
    args = options(arguments)
    rows = []
    for case in cases(args):
        rows.append(count(case, args.kernels))
        print(f"{case}: {rows[-1].traffic.launches:,} launches, {rows[-1].traffic.bytes / 1e9:.2f} GB", file=sys.stderr)
        if args.detail:
            print(detail(rows[-1]))
    text = table(rows)
    print(text)
    if args.json:
        args.json.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if args.write:
        notes = re.sub(r"\n    python .*?\n\n", "\n", (__doc__ or ""), flags=re.DOTALL)
        RESULTS.write_text(
            f"# Counted traffic of one step\n\nDate: {datetime.date.today()}. Versions: torch {torch.__version__}. "
            f"Command: `python benchmarks/traffic.py {' '.join(arguments or sys.argv[1:])}`.\n\n{notes}\n{text}",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
