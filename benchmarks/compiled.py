"""What Triton's compiler and ptxas make of the kernels for GPUs that need not be here.

    python benchmarks/compiled.py                        # A100 and H100
    python benchmarks/compiled.py --targets 86 --json FILE

Nothing is run, so nothing is timed. Each kernel is compiled as a launch on matrices like LLaMA's would be, whose sides
are multiples of eight, and the machine code is read:

- registers of a thread, and bytes of its stack: numbers that did not fit into registers;
- bytes of shared memory of a program, and its warps;
- accesses to global memory by their width. 16 bytes a thread are the most there is. Of narrower ones each kernel has
  some for tables of addresses, scaling factors and norms, which are small; draw looks its entries up in a table;
- instructions for tensor cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from launches import instead_of_launches
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from apollo_dist.kernels import triton as kernels
from apollo_dist.kernels.parts import AdamWPart, ApplyPart, ProjectPart, RowsPart
from apollo_dist.kernels.rounding import Rounding

RESULTS = Path(__file__).resolve().parent / "results" / "compiled.md"
TARGETS = {80: "A100", 90: "H100"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
ROWS, COLUMNS = 256, 512
HOW = Rounding((1, 2, 3), 1, 0, (COLUMNS, 1))
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


class Row(NamedTuple):
    """What became of one kernel for one target: bytes, counts of instructions."""

    case: str
    target: int
    registers: int
    stack: int
    shared: int
    warps: int
    wide: int
    narrow: int
    tensor_core: int
    fused: int


class Absent:
    """Stands for the driver of a GPU that is not here: the compiler asks it for the architecture alone."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return self._target

    def get_current_device(self) -> int:
        """A number of its own, since Triton keeps what it has compiled by device."""
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


def matrix(dtype: torch.dtype, turned: bool = False) -> Tensor:
    """A matrix of the dtype; turned, its first dimension is the contiguous one."""
    return torch.zeros((COLUMNS, ROWS), dtype=dtype).t() if turned else torch.zeros((ROWS, COLUMNS), dtype=dtype)


def cases(ranks: list[int], gradients: list[torch.dtype]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches by name: gradients whose channels are rows (tall matrices) and columns (wide ones), in their dtypes."""
    coefficients = torch.zeros((1, 2))
    for rank in ranks:
        columns, out = torch.zeros((rank, COLUMNS), dtype=BF16).t(), torch.zeros((ROWS, rank))
        for dtype in gradients:
            for turned in (False, True):
                part = ProjectPart(matrix(dtype, turned), columns, 0)
                yield (
                    f"project, rank {rank}, {NAMES[dtype]}, {'columns' if turned else 'rows'}",
                    lambda part=part, out=out: kernels.project([part], 0.5, out, torch.zeros(ROWS)),
                )
    for weights, grads, rounding in ((BF16, BF16, None), (FP32, FP32, None), (FP32, BF16, None), (BF16, BF16, HOW)):
        for turned in (False, True):
            how = rounding._replace(strides=(1, ROWS)) if rounding and turned else rounding
            part = ApplyPart(matrix(weights, turned), matrix(grads, turned), torch.zeros(ROWS), 0, how)
            kind = f"{NAMES[weights]} {'rounded stochastically ' if rounding else ''}by {NAMES[grads]}"
            yield (
                f"apply, {kind}, {'columns' if turned else 'rows'}",
                lambda part=part: kernels.apply([part], coefficients),
            )
    for by_rows in (True, False):
        factors = torch.zeros(ROWS if by_rows else COLUMNS)
        codes, scales = matrix(torch.int8), torch.zeros(ROWS, dtype=BF16)
        rows = RowsPart(codes, scales, matrix(BF16), factors, int(by_rows), 0, HOW)
        yield (
            f"apply_rows, int8 by bf16, {'rows' if by_rows else 'columns'}",
            lambda rows=rows: kernels.apply_rows([rows], coefficients),
        )
    for weights, states, rounding in ((BF16, FP32, None), (FP32, FP32, None), (BF16, BF16, HOW)):
        w, g, m, v = (torch.zeros(ROWS * COLUMNS, dtype=dtype) for dtype in (weights, weights, states, states))
        tensor = AdamWPart(w, g, m, v, COLUMNS, rounding, (rounding, rounding) if rounding else None)
        yield (
            f"adamw, {NAMES[weights]}, moments {NAMES[states]}{', rounded stochastically' if rounding else ''}",
            lambda tensor=tensor: kernels.adamw([tensor], coefficients[0], **ADAM),
        )
    for rank in (256, 1):
        numbers = [torch.zeros((COLUMNS, rank)) for _ in range(3)]
        yield (
            f"moments, rank {rank}",
            lambda numbers=numbers: kernels.moments(*numbers, torch.zeros(COLUMNS), torch.zeros(COLUMNS), **ADAM),
        )
    keys, table = torch.zeros((2, 5), dtype=torch.int64), torch.zeros(1 << 16, dtype=BF16)
    slabs = torch.zeros((2, 256, COLUMNS), dtype=BF16)
    yield "draw", lambda: kernels.draw(keys, table, slabs)
    yield "draw_signs", lambda: kernels.draw_signs(keys, slabs)
    yield "add_up", lambda: kernels.add_up(torch.zeros((8, 1 << 14)), torch.zeros(1 << 14))


def compiled(capability: int, ranks: list[int], gradients: list[torch.dtype]) -> Iterator[Row]:
    """Compile each case for a target, such as 80, and projections of some ranks, of gradients in some dtypes."""
    driver.set_active(Absent(capability))
    for name, call in cases(ranks, gradients):
        made: list[Any] = []
        with _compiling(made):
            call()
        (kernel,) = made
        yield _read(name, capability, kernel)


@contextmanager
def _compiling(made: list[Any]) -> Iterator[None]:
    """Let launches compile, and do nothing else."""

    def launch(kernel: Any, grid: Any, device: Any, cost: Any, *args: Any, **constants: Any) -> None:
        made.append(kernel.warmup(*args, grid=grid, **({"enable_fp_fusion": True} | constants)))

    with instead_of_launches(launch):
        yield


def _read(name: str, capability: int, kernel: Any) -> Row:
    """What the machine code of a kernel says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    words = Counter(re.findall(r"\b((?:LDG|STG|LDGSTS|HMMA|HGMMA|UTC[A-Z]*MMA|FFMA)(?:\.[\w.]+)?)", code))
    memory = {word: count for word, count in words.items() if word.startswith(("LDG.", "STG.", "LDGSTS."))}
    wide = sum(count for word, count in memory.items() if word.endswith(".128"))
    products = sum(count for word, count in words.items() if word.startswith(("HMMA", "HGMMA", "UTC")))
    narrow = sum(memory.values()) - wide
    return Row(
        name, capability, sizes["REG"], sizes["STACK"], kernel.metadata.shared, kernel.metadata.num_warps, wide, narrow,
        products, sum(count for word, count in words.items() if word.startswith("FFMA")),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| kernel | GPU | registers | stack, bytes | shared, bytes | warps | accesses of 16 bytes | narrower | "
        "tensor-core instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gpu = f"sm_{row.target}" + (f" ({TARGETS[row.target]})" if row.target in TARGETS else "")
        cells = row.case, gpu, row.registers, row.stack, f"{row.shared:,}", row.warps, row.wide, row.narrow
        lines.append("| " + " | ".join(map(str, (*cells, row.tensor_core or ""))).rstrip() + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--targets", nargs="+", type=int, default=list(TARGETS), help="compute capabilities: 80 for 8.0"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[256, 128, 1], help="of projections")
    names = list(NAMES.values())
    parser.add_argument("--gradients", nargs="+", choices=names, default=names, help="that are projected")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULTS.name} in benchmarks/results")
    args = parser.parse_args(arguments)
    dtypes = [dtype for dtype, name in NAMES.items() if name in args.gradients]
    rows = [row for target in args.targets for row in compiled(target, args.ranks, dtypes)]
    text = table(rows)
    print(text)
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
    if args.write:
        notes = re.sub(r"\n    python .*?\n\n", "\n", (__doc__ or ""), flags=re.DOTALL)
        command = f"python benchmarks/compiled.py {' '.join(arguments or sys.argv[1:])}"
        RESULTS.write_text(
            f"# What the kernels are compiled to\n\nDate: {datetime.date.today()}. "
            f"Versions: torch {torch.__version__}, Triton {triton.__version__}. "
            f"Command: `{command}`. No GPU was there, and nothing was run.\n\n"
            f"{notes}\n{text}",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
