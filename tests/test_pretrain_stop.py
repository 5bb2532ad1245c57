"""Runs that are asked to stop or to save: all ranks end or save after one step, and resume bit for bit."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from apollo_dist.pretrain.stop import STOPPED

from .pretrain_runs import SMALL, SMALL_APOLLO, command, environment, rows, write_text

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("stop")
    write_text(base / "text")
    return base


def arguments(output: str, *more: str) -> list[str]:
    """A run of 60 steps that validates every 20."""
    given = {word.split("=")[0] for word in more} | {"--steps", "--eval_every"}
    kept = [word for word in [*SMALL, *SMALL_APOLLO] if word.split("=")[0] not in given]
    return [*kept, f"--steps={STEPS}", "--eval_every=20", "--data=text", f"--output={output}", *more]


@contextlib.contextmanager
def started(launcher: str, ranks: int, given: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run, with what it prints in ``OUTPUT.log``; nothing of it is left afterwards."""
    (output,) = (word.partition("=")[2] for word in given if word.startswith("--output="))
    with (folder / f"{output}.log").open("w") as log:
        job = subprocess.Popen(
            command(launcher, ranks) + given, cwd=folder, env=environment(), stdout=log, stderr=log, text=True
        )
        try:
            yield job
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(job.pid).children(recursive=True):
                    process.kill()
            job.kill()
            job.wait()


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert job.poll() is None, f"the run ended by itself\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"nothing happened\n{log.read_text()[-4000:]}"
        time.sleep(0.005)


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def worker(job: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank under torchrun."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                found.append(process)
    (process,) = found
    return process


def curve(output: Path) -> list[tuple[object, ...]]:
    return [(r["step"], r.get("loss"), r.get("validation_loss"), r.get("lr"), r.get("tokens")) for r in rows(output)]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_bit_for_bit(folder: Path) -> None:
    options = ["--engine=fsdp2", "--micro_batch_size=1"]
    done = subprocess.run(
        command("torchrun", 2) + arguments("straight", *options), cwd=folder, env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    output, log = folder / "asked", folder / "asked.log"
    last = 0
    for number, again in ((signal.SIGUSR1, 3), (signal.SIGTERM, 0)):
        more = ["--resume"] if last else []
        with started("torchrun", 2, arguments("asked", *options, *more), folder) as job:
            wait_for(lambda goal=last + 5: steps_done(output) >= goal, job, log)
            rank_1 = worker(job, 1)
            seen = steps_done(output)
            rank_1.send_signal(number)
            for _ in range(again):  # during the checkpoint, as far as the timing goes
                time.sleep(0.02)
                with contextlib.suppress(psutil.Error):
                    rank_1.send_signal(number)
            assert job.wait(timeout=60) != 0
        record = json.loads((output / "stopped.json").read_text())
        assert record["reason"] == number.name
        assert record["checkpoint"].endswith(f"step_{record['step']:08d}")
        assert last < record["step"] == steps_done(output) < STEPS
        assert record["step"] <= seen + 3  # a step may end before the signal is heard, and another before it is agreed
        text = log.read_text()
        assert text.count(f"exitcode  : {STOPPED}") == 2, text[-4000:]
        assert f"stopped after step {record['step']} ({number.name})" in text
        last = record["step"]
    with started("torchrun", 2, arguments("asked", *options, "--resume"), folder) as job:
        assert job.wait(timeout=90) == 0, log.read_text()[-3000:]
    assert f"removed {Path('asked') / 'stopped.json'}" in log.read_text()
    assert not (output / "stopped.json").exists()
    assert json.loads((output / "finished.json").read_text())["step"] == STEPS
    assert curve(output) == curve(folder / "straight")
    elapsed = [row["elapsed"] for row in rows(output)]
    assert elapsed == sorted(elapsed)
