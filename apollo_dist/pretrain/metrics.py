"""What a run writes down: ``metrics.jsonl`` always, a progress bar, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config

FILE = "metrics.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a killed process left unfinished is dropped.

    Raises ValueError, with the line's number, where another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


class Metrics:
    """Rank 0's records; on other ranks every method does nothing.

    ``metrics.jsonl`` is one curve: starting at ``step`` keeps the rows up to it and drops later ones.
    """

    def __init__(self, config: Config, first: bool, step: int) -> None:
        self._on = first
        self.rows: list[dict[str, Any]] = []
        self._loggers: list[Any] = []
        if not first:
            return
        folder = config.output_folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        if step and self._path.exists():
            self.rows = [row for row in read_rows(self._path) if row["step"] <= step]
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(fresh, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        interval = 0.5 if sys.stderr.isatty() else 10.0
        from tqdm import tqdm  # an optional dependency

        self._bar = tqdm(total=config.steps, initial=step, unit="step", mininterval=interval, dynamic_ncols=True)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._loggers.append(_TensorBoard(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)))
        if config.wandb is not None:
            import wandb  # type: ignore[import-not-found,unused-ignore]

            self._loggers.append(wandb.init(project=config.wandb, dir=str(folder), config=config.computed()))

    @property
    def elapsed(self) -> float:
        """Seconds of training that the rows so far account for."""
        return float(self.rows[-1]["elapsed"]) if self.rows else 0.0

    def train(self, row: Mapping[str, float]) -> None:
        """Record a training step.

        Args:
            row: step, loss (if finite), lr, tokens, tokens_per_s, mfu (if the device's peak is known), peak_memory in
                bytes, elapsed; skipped if left out.
        """
        if self._on:
            self._write(row)
            shown = {
                "loss": f"{row.get('loss', math.nan):.4f}",
                "tok/s": f"{row['tokens_per_s']:,.0f}",
                "lr": f"{row['lr']:.2e}",
            }
            if "mfu" in row:
                shown["mfu"] = f"{row['mfu']:.1%}"
            self._bar.set_postfix({**shown, "mem": f"{row['peak_memory'] / 2**20:,.0f}MiB"}, refresh=False)
            self._bar.update()

    def evaluation(self, row: Mapping[str, float | None]) -> None:
        """Record a validation: step, validation_loss, perplexity, bits_per_byte, validation_tokens, elapsed."""
        if self._on:
            self._write(row)
            bits = "" if row["bits_per_byte"] is None else f"  bits per byte {row['bits_per_byte']:.4f}"
            head = f"step {row['step']}: validation loss {row['validation_loss']:.4f}"
            self.say(f"{head}  perplexity {row['perplexity']:.3f}{bits}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar, to standard output."""
        if self._on:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def sync(self) -> None:
        """Make what is written survive a crash of the machine."""
        if self._on:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the bar and the files; a second call does nothing."""
        if self._on:
            self._on = False
            self._bar.close()
            self._file.close()
            for logger in self._loggers:
                getattr(logger, "finish", lambda: None)()

    def _write(self, row: Mapping[str, float | None]) -> None:
        self.rows.append(dict(row))
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = {key: value for key, value in row.items() if value is not None and key != "step"}
        for logger in self._loggers:
            logger.log(numbers, step=row["step"])


class _TensorBoard:
    """A SummaryWriter with the methods of a Weights & Biases run."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self._writer.close()


def check_loggers(config: Config) -> None:
    """Raise ValueError if a logger is asked for that is not installed."""
    for asked, module in ((config.tensorboard, "tensorboard"), (config.wandb is not None, "wandb")):
        if asked and importlib.util.find_spec(module) is None:
            raise ValueError(f"--{module} needs the package {module}: pip install {module}, or drop the option")


def memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
