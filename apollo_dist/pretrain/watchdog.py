"""A thread that ends a process which waits too long, with the stacks of all its threads.

A hang shows on every rank but the one that causes it: they wait in a collective, where Python gets no turn, so
each rank watches itself. PyTorch's own timeouts end a hang too, but each covers its own calls only, and says nothing
about where the process was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apollo_dist.pretrain.distributed import Ranks

HUNG = 86  # exit code of a rank that waited too long
SLOW = 10.0  # set-up, the first step, validation, a checkpoint and the end may take this many times the limit
LAST_WORDS_SECONDS = 2.0  # between a rank's stacks and its end, after which launchers end the other ranks
WRITING_SECONDS = 5.0  # how long stacks may take to write: the file system may be what hangs
NET_SECONDS = 10.0  # how much later Python's own timer ends a process whose threads get no turn


class Watchdog:
    """Ends this process with exit code 86 where what was announced by `mark` takes longer than its limit.

    Works while the main thread is inside a collective, a kernel or a system call. Where a thread keeps Python's lock
    all that time, faulthandler's timer, which needs none, writes the stacks to standard error 10 s later and ends the
    process with exit code 1. A process that was suspended (SIGSTOP) for that long counts as one that waited: ranks that
    end wake the others of their machine, so that these end too, and launchers need not wait until they may kill them.

    Args:
        limit: seconds for a step; 0 switches it off.
        rank: of this process, for the message.
        folder: the run's output folder; stacks go to ``logs/stacks-rank-N.txt`` in it, and to standard error.
    """

    def __init__(self, limit: float, rank: str, folder: Path) -> None:
        self.folder = folder
        self._limit, self._rank = limit, rank
        self._awaited = ("", 0.0, 0.0)  # task, when it began, seconds allowed; replaced as a whole
        self._over = threading.Event()
        self._neighbours: list[int] = []  # process ids

    def meet(self, ranks: Ranks) -> None:
        """Learn which other ranks run on this machine; collective."""
        namespace = Path("/proc/self/ns/pid")
        machine = (socket.gethostname(), str(namespace.readlink()) if namespace.exists() else "")
        everyone = ranks.gather((machine, os.getpid()))
        self._neighbours = [pid for other, pid in everyone if other == machine and pid != os.getpid()]

    def __enter__(self) -> Watchdog:
        if self._limit:
            self.mark("set-up", SLOW)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._limit:
            self._over.set()
            faulthandler.cancel_dump_traceback_later()

    def mark(self, task: str, patience: float = 1.0) -> None:
        """Everything before is done: begin to wait for ``task``, up to ``patience`` times the limit."""
        if self._limit:
            allowed = self._limit * patience
            self._awaited = (task, time.monotonic(), allowed)
            faulthandler.dump_traceback_later(allowed + NET_SECONDS, exit=True, file=_standard_error())

    def _watch(self) -> None:
        while True:
            asleep, now = self._awaited, time.monotonic()
            if self._over.wait(min(1.0, self._limit / 10)):
                return
            before, now = now, time.monotonic()
            # Once awake, a suspended process may soon be past what it was to do meanwhile.
            if now - before > asleep[2] + 1.0:
                self._end(f"was suspended for {now - before:.0f} s during {asleep[0]}")
            task, began, allowed = self._awaited
            if now - began > allowed:
                self._end(f"waited {allowed:g} s for {task}")

    def _end(self, what: str) -> None:
        message = (
            f"watchdog: rank {self._rank} on {socket.gethostname()} {what}; "
            f"ends with exit code {HUNG}. Stacks of its threads:\n"
        ).encode()
        _briefly(lambda: _dump(_standard_error(), message))
        _briefly(lambda: self._dump_to_file(message))
        time.sleep(LAST_WORDS_SECONDS)
        for pid in self._neighbours:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        os._exit(HUNG)

    def _dump_to_file(self, message: bytes) -> None:
        path = self.folder / "logs" / f"stacks-rank-{self._rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            _dump(file.fileno(), message)


def _dump(descriptor: int, message: bytes) -> None:
    os.write(descriptor, message)
    faulthandler.dump_traceback(descriptor, all_threads=True)


def _briefly(work: Callable[[], None]) -> None:
    def attempt() -> None:
        with contextlib.suppress(OSError):
            work()

    writer = threading.Thread(target=attempt, name="watchdog's words", daemon=True)
    writer.start()
    writer.join(WRITING_SECONDS)


def _standard_error() -> int:
    """The descriptor behind ``sys.stderr``; 2 where it has none, as under pytest."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
