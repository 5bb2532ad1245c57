"""Processes that wait too long end by themselves, with their stacks, whatever their main thread is doing."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from ..pretrain_runs import environment
from ..ranks import run_python
from ..timeouts import allowed
from .test_pretrain_stop import arguments, started, steps_done, wait_for, worker, write_text

LIMIT = 4.0

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from apollo_dist.pretrain.watchdog import Watchdog

def waits_here():
    if sys.argv[1] == "lock":
        ctypes.PyDLL(None).sleep(60)  # keeps Python's lock
    elif sys.argv[1] == "call":
        ctypes.CDLL(None).sleep(60)
    elif sys.argv[1] == "slow":
        for number in range(8):
            watchdog.mark(f"step {number}")
            time.sleep(0.25)
    else:
        raise ValueError("an error of its own")

with Watchdog(float(sys.argv[2]), "3", Path(sys.argv[3])) as watchdog:
    watchdog.mark("step 7")
    waits_here()
time.sleep(1.5)
print("done")
"""


def program(case: str, limit: float, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    done = run_python("-c", PROGRAM, case, str(limit), str(folder), env=environment(), timeout=60)
    return done, time.monotonic() - began


def test_a_call_that_does_not_return_ends_with_the_stacks(tmp_path: Path) -> None:
    done, _ = program("call", 1.0, tmp_path)
    assert done.returncode == 86, done.stderr
    for text in (done.stderr, (tmp_path / "logs" / "stacks-rank-3.txt").read_text()):
        assert "rank 3" in text
        assert "waited 1 s for step 7" in text
        assert "in waits_here" in text


def test_a_log_folder_that_cannot_be_written_does_not_keep_it_alive(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done, _ = program("call", 1.0, tmp_path / "file")
    assert done.returncode == 86, done.stderr
    assert "in waits_here" in done.stderr


@pytest.mark.slow
def test_steps_within_the_limit_and_an_end_of_its_own_are_left_alone(tmp_path: Path) -> None:
    done, _ = program("slow", 1.0, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    done, _ = program("error", 1.0, tmp_path)
    assert done.returncode == 1
    assert "an error of its own" in done.stderr
    assert not (tmp_path / "logs").exists()
    done, _ = program("slow", 0.0, tmp_path)
    assert done.returncode == 0


@pytest.mark.slow
def test_a_process_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    done, seconds = program("lock", 1.0, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "in waits_here" in done.stderr
    assert seconds < allowed(30)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_job_with_a_stopped_rank_ends_within_the_limit_and_30_seconds(tmp_path: Path, launcher: str) -> None:
    write_text(tmp_path / "text")
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    engine = "--engine=fsdp2" if launcher == "torchrun" else "--deepspeed_config=zero2.json"
    given = arguments("hung", engine, f"--step_timeout={LIMIT}", steps=100000, eval_every=0)
    output, log = tmp_path / "hung", tmp_path / "hung.log"
    with started(launcher, 2, given, tmp_path) as job:
        wait_for(lambda: steps_done(output) >= 3, job, log)
        rank_1 = worker(job, 1)
        rank_1.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert job.wait(timeout=allowed(LIMIT + 60)) != 0
        seconds = time.monotonic() - began
        assert not rank_1.is_running() or rank_1.status() == "zombie"
    text = log.read_text()
    assert seconds < allowed(LIMIT + 30), text[-4000:]
    step = steps_done(output) + 1
    stacks = (output / "logs" / "stacks-rank-0.txt").read_text()
    for place in (text, stacks):
        assert f"waited {LIMIT:g} s for step {step}" in place, place[-4000:]
        assert "train_step" in place
    assert "exit code 86" in text
    # Woken by the other, the stopped one says where it was.
    stacks = (output / "logs" / "stacks-rank-1.txt").read_text()
    assert "rank 1" in stacks
    assert "train_step" in stacks
