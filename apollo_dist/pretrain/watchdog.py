"""A thread that ends a process which waits too long, with the stacks of all its threads.

A hang shows on every rank but the one that causes it: they wait in a collective, where Python gets no turn, so
each rank watches itself. PyTorch's own timeouts end a hang too, but each covers its own calls only, and says nothing
about where the process was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

HUNG = 86  # exit code of a rank that waited too long
SLOW = 10.0  # set-up, the first step, validation, a checkpoint and the end may take this many times the limit
LAST_WORDS_SECONDS = 2.0  # between a rank's stacks and its end, after which launchers end the other ranks
WRITING_SECONDS = 5.0  # how long stacks may take to write: the file system may be what hangs
NET_SECONDS = 10.0  # how much later Python's own timer ends a process whose threads get no turn


class Watchdog:
    """Ends this process with exit code 86 where what was announced by `mark` takes longer than its limit.

    Works while the main thread is inside a collective, a kernel or a system call. Where a thread keeps Python's lock
    all that time, faulthandler's timer, which needs none, writes the stacks to standard error 10 s later and ends the
    process with exit code 1. A process that was suspended (SIGSTOP) meanwhile counts as one that waited.

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
        while not self._over.wait(min(1.0, self._limit / 10)):
            task, began, allowed = self._awaited
            if time.monotonic() - began > allowed:
                self._end(task, allowed)

    def _end(self, task: str, allowed: float) -> None:
        message = (
            f"watchdog: rank {self._rank} on {socket.gethostname()} waited {allowed:g} s for {task}; "
            f"ends with exit code {HUNG}. Stacks of its threads:\n"
        ).encode()
        _briefly(lambda: _dump(_standard_error(), message))
        _briefly(lambda: self._dump_to_file(message))
        time.sleep(LAST_WORDS_SECONDS)
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
