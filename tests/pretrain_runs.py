"""Small pre-training runs through real launchers, for the tests of `apollo_dist.pretrain`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from .ranks import run_module_on_ranks
from .timeouts import allowed

ROOT = Path(__file__).resolve().parents[1]

# A LLaMA with a few thousand parameters; 5 validation sequences do not divide by 2 ranks or by micro-batches of 2.
SMALL = (
    "--model.hidden_size=16 --model.intermediate_size=24 --model.num_layers=2 --model.num_heads=2 "
    "--sequence_length=16 --batch_size=4 --steps=8 --warmup_steps=2 --eval_every=3 "
    "--eval_sequences=5 --final_eval_sequences=7"
).split()
SMALL_APOLLO = ["--optimizer.rank=4", "--optimizer.update_proj_gap=3"]

ZERO2 = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_scatter": True},
}


def write_text(folder: Path, files: int = 6, words: int = 400) -> Path:
    """A folder of text files with made-up sentences."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        chosen = rng.choices(
            ["matrix", "tile", "channel", "owner", "plan", "the", "a", "of", "sends", "keeps"], k=words
        )
        (folder / f"text_{number}.txt").write_text(" ".join(chosen) + "\n")
    return folder


def environment() -> dict[str, str]:
    """The environment of a launched run: one thread per rank, no traces of an outer launcher."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    # This machine's oneDNN may die with SIGILL in bf16 without the cap; it changes nothing in fp32.
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def free_port() -> int:
    """A TCP port that nobody listens on now.

    Rank 0 listens on it seconds later: the kernel must not have given it to somebody else by then, as it does with
    ports from 32768 on.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def command(launcher: str, ranks: int, module: str = "apollo_dist.pretrain") -> list[str]:
    """The command line up to the module's own arguments; ``launcher`` is python, torchrun or deepspeed."""
    if launcher == "python":
        return [sys.executable, "-m", module]
    if launcher == "torchrun":
        head = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [*head, "-m", module]
    head = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_accelerators={ranks}"]
    return [*head, f"--master_port={free_port()}", "--module", module]


def run(
    launcher: str, ranks: int, arguments: list[str], cwd: Path, forked: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end and return what it printed; not longer than two minutes.

    Args:
        launcher: python, torchrun or deepspeed.
        ranks: how many.
        arguments: of the module.
        cwd: the working directory.
        forked: start the ranks themselves, as the launcher starts them but in a tenth of the time, and no launcher:
            for tests of what the ranks do.
    """
    if not forked:
        return subprocess.run(
            command(launcher, ranks) + arguments, cwd=cwd, env=environment(), capture_output=True, text=True,
            timeout=allowed(120),
        )  # fmt: skip
    if launcher == "python":
        return run_module_on_ranks("apollo_dist.pretrain", [arguments], [environment()], cwd)
    local_ranks = [[f"--local_rank={rank}"] if launcher == "deepspeed" else [] for rank in range(ranks)]
    return run_different([[*local_rank, *arguments] for local_rank in local_ranks], cwd)


def run_different(arguments: list[list[str]], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Forked ranks, each with arguments of its own, in the environment that torchrun makes."""
    port, world = str(free_port()), str(len(arguments))
    environments = [
        {
            **environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
        for rank in range(len(arguments))
    ]  # fmt: skip
    return run_module_on_ranks("apollo_dist.pretrain", arguments, environments, cwd)


def succeed(launcher: str, ranks: int, arguments: list[str], cwd: Path, forked: bool = False) -> str:
    """``run``, require success, and return standard output."""
    done = run(launcher, ranks, arguments, cwd, forked)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows(output: Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, float]:
    """Training loss by step."""
    return {int(row["step"]): row["loss"] for row in rows(output) if "loss" in row}


def validations(output: Path) -> dict[int, float]:
    """Validation loss by step."""
    return {int(row["step"]): row["validation_loss"] for row in rows(output) if "validation_loss" in row}


def rewind(output: Path, target: Path, step: int) -> Path:
    """A copy of a run's folder as it stood when the checkpoint of ``step`` was the newest, later metrics left in."""
    shutil.copytree(output, target)
    for checkpoint in (target / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (target / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    return target
