"""Run a function on several gloo ranks, with a file rendezvous and a short timeout.

Ranks are forked from a process that has imported everything (``template.py``): a start takes a tenth of a second.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .template import Child, run_interpreter, run_module, template
from .timeouts import allowed
from .versions import mend_torch

TIMEOUT_S = 60
GRACE_S = 3  # for the other ranks to tell why they failed, too, once one has


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """``fn(rank, world, *args)`` on every rank; the results, in rank order.

    Args:
        fn: a function that can be pickled, as its arguments and its result.
        world: the number of ranks.
        timeout: seconds on an idle machine, ``allowed`` to be more on a busy one.

    Raises:
        AssertionError: with the rank's traceback if a rank fails, or if the ranks do not end in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(_rank, rank, world, folder, fn, args) for rank in range(world)]
        codes, in_time = _run([(job, {}) for job in jobs], timeout)
        assert in_time, f"ranks did not end within {timeout} s\n{_failures(folder)}"
        assert not any(codes), f"exit statuses of the ranks: {codes}\n{_failures(folder)}"
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world)]


def run_module_on_ranks(
    module: str, arguments: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], cwd: Path,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """``python -m module arguments`` on forked ranks, one for each of ``arguments`` and ``environments``.

    This is what a launcher starts, without the launcher: when a rank fails, the others are ended. The exit status is
    that of a rank that failed, or 0.

    Raises:
        subprocess.TimeoutExpired: if the ranks do not end in ``timeout`` seconds.
    """
    jobs = [((run_module, module, list(own)), env) for own, env in zip(arguments, environments, strict=True)]
    return _captured(module, jobs, cwd, timeout)


def run_python(
    *words: str, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """``python *words`` in a forked process, for tests of what a program does: imports take no time.

    Args:
        words: ``-m MODULE``, ``-c CODE`` or a file, and arguments.
        env, cwd: the whole environment and the working directory; those of this process by default.
        timeout: seconds on an idle machine, ``allowed`` to be more on a busy one.

    Raises:
        subprocess.TimeoutExpired: if it does not end in ``timeout`` seconds.
    """
    return _captured(words[0], [((run_interpreter, *words), env or dict(os.environ))], cwd, timeout)


def _captured(
    name: str, jobs: list[tuple[tuple[Any, ...], dict[str, str]]], cwd: Path | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run jobs, each with an environment, side by side, and return what they printed."""
    # Opened for appending: each line goes to the end, whichever rank writes it.
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("a") as stdout, err.open("a") as stderr:
            files = {"stdout": stdout.fileno(), "stderr": stderr.fileno(), "cwd": cwd}
            codes, in_time = _run([(job, {**files, "env": env}) for job, env in jobs], timeout)
        if not in_time:
            raise subprocess.TimeoutExpired(name, timeout, out.read_text(), err.read_text())
        # A rank that was ended because another had failed has a negative status.
        code = max(codes) or min(codes)
        return subprocess.CompletedProcess(name, code, out.read_text(), err.read_text())


def _run(jobs: list[tuple[tuple[Any, ...], dict[str, Any]]], timeout: float) -> tuple[list[int], bool]:
    """Fork a process for each job; their exit statuses, and whether all ended, or one failed, within ``timeout``."""
    for number in range(min(len(jobs), 2)):
        template(number)  # both start before either is waited for
    ranks: list[Child] = []
    in_time = True
    try:
        for number, (job, options) in enumerate(jobs):
            ranks.append(template(number % 2).fork(*job, **options))
        deadline = time.monotonic() + allowed(timeout)
        # Every rank is asked each time: one that has failed is seen while those before it run.
        while in_time and None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            in_time = time.monotonic() < deadline
            time.sleep(0.01)
        deadline = time.monotonic() + allowed(GRACE_S)
        while in_time and any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        for rank in ranks:
            rank.kill()
        codes = [rank.wait() for rank in ranks]
    return codes, in_time


def _failures(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(folder).glob("failure-*")))


def _rank(rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    mend_torch()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=allowed(TIMEOUT_S)),
    )
    try:
        result = fn(rank, world, *args)
        torch.save(result, Path(folder) / f"result-{rank}")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"failure-{rank}").write_text(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the process group's own end: after an error it may wait for ever (seen with torch 2.6).
        os._exit(1)
    dist.destroy_process_group()
    # Not through Python's own end: it stops torch's C++ threads when they ask for the interpreter, and one time in some
    # thousands that is inside of a function that must not be left so ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
