"""Compare optimizers on one recipe: several learning rates each, several seeds for the best one, a table, a picture.

    python -m apollo_dist.pretrain.compare --output runs/compare
    python -m apollo_dist.pretrain.compare --optimizers apollo,adamw --seeds 0,1,2 --jobs 2 -- --recipe tiny --steps 600

Every run is one process of ``apollo_dist.pretrain`` in a folder of its own. A run that is finished is not repeated and
one that was cut off resumes from its checkpoint, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from apollo_dist.pretrain.metrics import FILE, read_rows
from apollo_dist.pretrain.optimizer_config import OPTIMIZERS, JsonOptimizer
from apollo_dist.pretrain.plot import plot
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.stop import FINISHED_FILE, write_whole


@dataclass(frozen=True)
class Job:
    """One run: what differs between runs, and where it writes."""

    optimizer: str
    lr: float
    seed: int
    root: Path

    @property
    def folder(self) -> Path:
        """The output folder of this run."""
        return self.root / f"{self.optimizer}-lr{self.lr:.3g}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end before."""
        return (self.folder / FINISHED_FILE).exists()

    def run(self, options: Sequence[str]) -> None:
        """Train, or go on from the newest checkpoint; RuntimeError with the end of the log if the run fails."""
        if self.finished:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        words = ["--optimizer", self.optimizer, "--lr", repr(self.lr), "--seed", str(self.seed)]
        words += [*options, "--output", str(self.folder)]
        words += ["--resume"] if any((self.folder / "checkpoints").glob("step_*")) else []
        with (self.folder / "log").open("a") as log:
            done = subprocess.run(
                [sys.executable, "-m", "apollo_dist.pretrain", *words],
                env={"OMP_NUM_THREADS": "1", **os.environ},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            end = (self.folder / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.folder} ended with exit code {done.returncode}; its log ends with\n{end}")


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached.

    Attributes:
        loss: of the last validation, nats per token.
        bits: bits per byte of the last validation; None where the text of a token is not known.
        step_ms: the median time of a training step, forward and backward pass included, in milliseconds.
        state_bytes: of the optimizer's state on the rank that has most of it.
    """

    loss: float
    bits: float | None
    step_ms: float
    state_bytes: int

    @property
    def value(self) -> float:
        """Bits per byte where they are known, else the loss."""
        return self.loss if self.bits is None else self.bits

    @classmethod
    @cache
    def of(cls, job: Job) -> Outcome:
        """Read it from a finished run's folder, which does not change any more."""
        rows = read_rows(job.folder / FILE)
        validated = [row for row in rows if "validation_loss" in row][-1]
        steps = [row for row in rows if "loss" in row]
        per_step = steps[0]["tokens"] / steps[0]["step"]
        speed = statistics.median(row["tokens_per_s"] for row in steps)
        state = json.loads((job.folder / FINISHED_FILE).read_text())["optimizer_state_bytes"]
        return cls(validated["validation_loss"], validated["bits_per_byte"], 1e3 * per_step / speed, int(state))


def train_all(jobs: Iterable[Job], options: Sequence[str], processes: int) -> None:
    """Run the jobs that are not finished, some at a time, under a progress bar."""
    from tqdm import tqdm  # an optional dependency

    every = list(jobs)
    with tqdm(total=len(every), unit="run") as bar, ThreadPoolExecutor(processes) as pool:
        bar.update(sum(job.finished for job in every))
        running = {pool.submit(job.run, options): job for job in every if not job.finished}
        try:
            for done in as_completed(running):
                done.result()
                bar.update()
                bar.write(f"finished {running[done].folder}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def rates_of(optimizer: str, factors: Sequence[float], options: Sequence[str]) -> list[float]:
    """The recipe's learning rate for an optimizer times each factor, to three digits."""
    config = load_settings(["--optimizer", optimizer, *options]).config.optimizer
    if isinstance(config, JsonOptimizer):
        raise ValueError("the DeepSpeed JSON names an optimizer; drop it from there to compare others")
    return [float(f"{config.lr * factor:.3g}") for factor in factors]


def best(jobs: Sequence[Job]) -> Job:
    """The run with the lowest validation loss; one that is not finite is the worst."""
    return min(jobs, key=lambda job: loss if (loss := Outcome.of(job).loss) == loss else float("inf"))


def line(jobs: Sequence[Job], rates: Sequence[Job]) -> str:
    """A line of the table: the runs of the best learning rate, and the other rates' results."""
    outcomes = [Outcome.of(job) for job in jobs]
    values = [one.value for one in outcomes]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    others = ", ".join(f"{job.lr:.3g}: {Outcome.of(job).value:.3f}" for job in rates if job.lr != jobs[0].lr)
    step = statistics.median(one.step_ms for one in outcomes)
    cells = [jobs[0].optimizer, f"{jobs[0].lr:.3g}", f"{statistics.mean(values):.3f}{spread}", str(len(values)), others]
    return "| " + " | ".join([*cells, f"{outcomes[0].state_bytes:,}", f"{step:.0f}"]) + " |"


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(word) for word in text.split(",")]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, and what follows ``--``: options of every run."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    mine, theirs = list(arguments[:at]), list(arguments[at + 1 :])
    parser = argparse.ArgumentParser(
        prog="python -m apollo_dist.pretrain.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder of all runs and of the table")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="names, between commas (default: all)")
    parser.add_argument("--factors", type=numbers, default=[0.3, 1.0, 3.0], help="times the recipe's learning rate")
    parser.add_argument("--seeds", type=numbers, default=[0.0, 1.0, 2.0], help="the first is that of the first round")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on one core")
    options = parser.parse_args(mine)
    unknown = [name for name in options.optimizers.split(",") if name not in OPTIMIZERS]
    if unknown:
        parser.error(f"unknown optimizer {unknown[0]!r}; there are {', '.join(OPTIMIZERS)}")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: it must be at least 1")
    return options, theirs


def main(arguments: Sequence[str]) -> int:
    """Train what is not finished, then print the table and write ``table.md`` and ``loss.png``."""
    options, theirs = parse(arguments)
    names, seeds = options.optimizers.split(","), [int(seed) for seed in options.seeds]
    first = {
        name: [Job(name, lr, seeds[0], options.output) for lr in rates_of(name, options.factors, theirs)]
        for name in names
    }
    train_all([job for jobs in first.values() for job in jobs], theirs, options.jobs)
    winners = {name: best(jobs) for name, jobs in first.items()}
    repeated = {name: [Job(name, job.lr, seed, options.output) for seed in seeds] for name, job in winners.items()}
    train_all([job for jobs in repeated.values() for job in jobs], theirs, options.jobs)
    unit = "validation loss" if Outcome.of(next(iter(winners.values()))).bits is None else "bits per byte"
    table = [
        f"| optimizer | lr | {unit} | seeds | other learning rates | optimizer state, bytes | step, ms |",
        "|---|---|---|---|---|---|---|",
        *(line(jobs, first[name]) for name, jobs in repeated.items()),
    ]
    write_whole(options.output / "table.md", "\n".join(table) + "\n")
    print("\n".join(table))
    drawn = plot({name: job.folder / FILE for name, job in winners.items()}, options.output / "loss.png")
    print(f"wrote {options.output / 'table.md'}" + (f" and {options.output / 'loss.png'}" if drawn else ""))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
