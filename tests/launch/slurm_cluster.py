"""A real SLURM cluster on this machine, for the tests of ``launch/``; see ``slurm_up.sh``."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ..pretrain_runs import ROOT, environment
from ..timeouts import allowed

SCRIPT = Path(__file__).with_name("slurm_up.sh")


def reason_to_skip() -> str | None:
    """Why no cluster can be made here, if so."""
    if os.geteuid() != 0:
        return "a SLURM cluster for tests needs root"
    if subprocess.run(["unshare", "-mnup", "--fork", "true"], capture_output=True).returncode:
        return "this machine gives no namespaces"
    return None


def fetch(prefix: Path) -> str | None:
    """Unpack SLURM, sshd and pdsh into ``prefix``; why that fails, if it does."""
    if (prefix / "usr").exists():
        return None
    try:
        done = subprocess.run(
            ["bash", SCRIPT, "fetch", prefix], env=_environment(prefix), capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"apt-get download failed: {done.stderr[-300:]}"


def _environment(prefix: Path) -> dict[str, str]:
    dropped = ("SLURM_", "SBATCH_", "PYTEST_")
    kept = {key: value for key, value in environment().items() if not key.startswith(dropped)}
    return {
        **kept,
        "SLURM_PREFIX": str(prefix),
        "SLURM_TEST_KILL_WAIT": str(round(allowed(20))),
        "APOLLO_SITE": "/dev/null",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


class Cluster:
    """``nodes`` machines n1, n2, ... and a login node. Killed, with every process in it, when the context ends."""

    def __init__(self, folder: Path, prefix: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = _environment(prefix)

    def __enter__(self) -> Cluster:
        self._control("up", self.folder, self.nodes)
        return self

    def __exit__(self, *error: object) -> None:
        self._control("down", self.folder)

    def _control(self, *words: object) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=allowed(120),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def command(self, *words: object) -> list[str]:
        """The command line, here, of a command on the login node."""
        return ["bash", str(SCRIPT), "exec", str(self.folder), *map(str, words)]

    def try_run(self, *words: object, **options: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, with ``options`` in its environment."""
        return subprocess.run(
            self.command(*words), env={**self.environment, **options}, cwd=ROOT, capture_output=True, text=True
        )

    def run(self, *words: object, **options: str) -> str:
        """Run a command on the login node, require success, and return its output."""
        done = self.try_run(*words, **options)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_ssh(self) -> None:
        """An sshd on every node; the login node may log in."""
        self._control("ssh", self.folder)

    def clear(self) -> None:
        """Cancel what a failed test has left behind, and wait until no job is left."""
        deadline = time.monotonic() + allowed(90)
        while jobs := self.run("squeue", "--noheader", "--format=%A").split():
            assert time.monotonic() < deadline, f"jobs {jobs} do not end"
            self.run("scancel", *jobs)
            time.sleep(1)

    def submit(self, *words: object, **options: str) -> Job:
        """``sbatch words``; the job's log goes into the cluster's folder."""
        log = self.folder / "%j.out"
        answer = self.run("sbatch", "--parsable", f"--output={log}", *words, **options)
        return Job(self, answer.strip())


def ranks(output: Path) -> dict[int, psutil.Process]:
    """The processes that train into ``output``, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            # Rank processes alone: launchers have the same words behind their own.
            head = words[1:4] if words[1:2] == ["-u"] else ["-u", *words[1:3]]
            if head == ["-u", "-m", "apollo_dist.pretrain"] and str(output) in " ".join(words):
                # A new object: psutil keeps those it has listed, and a number may be another process's by now.
                found[int(process.environ()["RANK"])] = psutil.Process(process.pid)
        except (psutil.Error, KeyError):
            continue
    return found


class Job:
    """A batch job."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self._cluster, self.number = cluster, number

    @property
    def log(self) -> str:
        """What the job has printed, over all its starts."""
        path = self._cluster.folder / f"{self.number}.out"
        return path.read_text() if path.exists() else ""

    def fact(self, name: str) -> str:
        """A field of ``scontrol show job``, such as JobState."""
        found = re.search(rf"\b{name}=(\S+)", self._cluster.run("scontrol", "show", "job", self.number))
        assert found is not None, name
        return found[1]

    @property
    def ended(self) -> bool:
        """Whether the job is over. One that waits for another start is not."""
        return self.fact("JobState") in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.2) -> None:
        """Wait until ``condition`` holds; an AssertionError with the job's log where it takes too long."""
        deadline = time.monotonic() + allowed(seconds)
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.number}, {self.fact('JobState')}: no {what} in {seconds} s\n{self.log}"
                )
            time.sleep(pause)

    def wait_for_step(self, output: Path, step: int, seconds: float) -> None:
        """Wait until the run in ``output`` has made a step; an AssertionError as soon as the job ends before it."""
        polls = itertools.count(1)  # SLURM is asked every few seconds only, and rarely while steps are made

        def there() -> bool:
            done = steps_done(output)
            return done >= step or (next(polls) % (400 if done else 60) == 0 and self.ended)

        self.wait_for(there, seconds, f"step {step}", pause=0.05)
        assert steps_done(output) >= step, f"job {self.number} ended before step {step}\n{self.log}"

    def wait(self, seconds: float, state: str = "COMPLETED") -> None:
        """Wait for the job's end, and require its state."""
        self.wait_for(lambda: self.ended, seconds, "end")
        assert self.fact("JobState") == state, self.log


def steps_done(output: Path) -> int:
    """Steps in the run's metrics so far."""
    path = output / "metrics.jsonl"
    numbers = [0]
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            numbers.append(int(json.loads(line)["step"]))
        except json.JSONDecodeError:  # being written
            continue
    return max(numbers)
