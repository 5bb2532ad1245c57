"""A run of two ranks, one of which is killed 20 times, ends with the weights and losses of a run left in peace."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apollo_dist.checkpoint.export import export
from apollo_dist.pretrain.metrics import FILE, read_rows

from ..pretrain_runs import SMALL, SMALL_APOLLO, free_port, write_text
from ..timeouts import allowed

KILLS, STEPS, EVERY = 20, 240, 4
# A rank starts in a tenth of a second from a server that has imported all of this.
PRELOADED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "apollo_dist.pretrain.train",
    "apollo_dist.checkpoint",
]


def rank_main(rank: int, port: int, arguments: list[str], log: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  open as long as the process lives
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    from apollo_dist.pretrain.__main__ import main

    sys.exit(main(arguments))


def start(folder: Path, name: str, resume: bool) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    sizes = {"--steps": STEPS, "--eval_every": 0, "--checkpoint_every": EVERY, "--keep_checkpoints": 2}
    kept = [word for word in SMALL if word.split("=")[0] not in sizes]
    arguments = [
        *kept, *SMALL_APOLLO, *(f"{key}={value}" for key, value in sizes.items()),
        "--engine=fsdp2", "--timeout_minutes=0.5", f"--data={folder / 'text'}", f"--output={folder / name}",
        *(["--resume"] if resume else []),
    ]  # fmt: skip
    port = free_port()
    processes: list[BaseProcess] = [
        context.Process(target=rank_main, args=(rank, port, arguments, str(folder / f"{name}-{rank}.log")))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def steps_done(run: Path) -> int:
    """Steps in the metrics file, also those after the newest checkpoint."""
    path = run / FILE
    return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob(".draft_step_*"))


def set_aside(run: Path) -> None:
    """Give what a killed save left another name, which ``saving`` does not take for a new one."""
    for draft in (run / "checkpoints").glob(".draft_step_*"):
        draft.rename(draft.with_name(f".draft_dead{draft.name}"))


def end(process: BaseProcess, timeout: float) -> int | None:
    """The exit code; None for a process that had to be killed, whose stacks are then in its log."""
    process.join(allowed(timeout))
    code = process.exitcode
    if code is None and process.pid is not None:
        os.kill(process.pid, signal.SIGUSR2)
        process.join(2)
        process.kill()
    return code


def logs(folder: Path) -> str:
    return "".join(f"{path.name}:\n{path.read_text()[-4000:]}\n" for path in sorted(folder.glob("*-?.log")))


def wait_for(condition: Callable[[], bool], processes: list[BaseProcess], folder: Path) -> None:
    deadline = time.monotonic() + allowed(120)
    while not condition():
        assert all(process.is_alive() for process in processes), f"a rank ended by itself\n{logs(folder)}"
        assert time.monotonic() < deadline, f"nothing happened for two minutes\n{logs(folder)}"


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run / FILE) if "loss" in row}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    rng = random.Random(0)
    run = tmp_path / "killed"
    inside = 0
    for kill in range(KILLS):
        before = steps_done(run)
        processes = start(tmp_path, "killed", resume=(run / "checkpoints" / "latest").exists())
        if kill % 2:
            # Inside a checkpoint: the first or the second one of this start, at a random moment of it.
            for _ in range(rng.randrange(2)):
                wait_for(lambda: saving(run), processes, tmp_path)
                wait_for(lambda: not saving(run), processes, tmp_path)
            wait_for(lambda: saving(run), processes, tmp_path)
            time.sleep(rng.uniform(0, 0.02))
        else:
            goal = before + rng.randrange(1, 12)
            wait_for(lambda goal=goal: steps_done(run) >= goal, processes, tmp_path)
            time.sleep(rng.uniform(0, 0.03))
        victim = processes[rng.randrange(2)]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        # One that had not met the other yet waits for it as long as --timeout_minutes; a launcher would end it at once.
        codes = [end(process, 60) for process in processes]
        assert all(codes), f"kill {kill} (exit codes {codes}): a rank did not end, or ended well\n{logs(tmp_path)}"
        inside += saving(run)
        set_aside(run)
    assert inside >= 3, f"only {inside} kills hit a checkpoint"
    assert steps_done(run) < STEPS, "the run was over before the last kill"

    for name, resume in (("killed", True), ("undisturbed", False)):
        processes = start(tmp_path, name, resume)
        assert [end(process, 300) for process in processes] == [0, 0], logs(tmp_path)
        export(tmp_path / name / "checkpoints", tmp_path / f"{name}-weights")
    assert losses(run) == losses(tmp_path / "undisturbed")
    weights = [load_file(tmp_path / f"{name}-weights" / "model.safetensors") for name in ("killed", "undisturbed")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
