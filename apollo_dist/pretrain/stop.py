"""Requests to stop or to save, agreed on by all ranks at a step boundary, and the record of how a run ended.

SIGTERM and SIGUSR1, to any rank, and a file ``STOP`` in the output folder end the run with a checkpoint; a file
``SAVE`` asks for a checkpoint alone. Requests travel in the sum over ranks that a step makes for its loss, so that
every rank takes the same decision after the same step, and no step costs a collective more.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

STOPPED = 85  # exit code of a run that stopped because it was asked to, and can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP, SAVE = "STOP", "SAVE"  # files that the user makes
STOPPED_FILE, FINISHED_FILE = "stopped.json", "finished.json"
WORDS = (*(number.name for number in SIGNALS), STOP, SAVE)


class Requests:
    """What the run has been asked for: `counts` of each rank are summed, and `agree` takes the sum."""

    def __init__(self) -> None:
        self._heard: set[str] = set()
        self._folder: Path | None = None
        self._agreed: set[str] = set()

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler: notes the signal, which may come again and again."""
        self._heard.add(signal.Signals(number).name)

    def look_in(self, folder: Path) -> None:
        """Look for STOP and SAVE in ``folder`` from now on; one rank does, so that a file counts from one step on."""
        self._folder = folder

    def counts(self) -> list[float]:
        """1.0 for each of `WORDS` that this rank has seen, else 0.0."""
        files = {word for word in (STOP, SAVE) if self._folder is not None and (self._folder / word).exists()}
        return [float(word in self._heard or word in files) for word in WORDS]

    def agree(self, summed: Sequence[float]) -> None:
        """Take over what the ranks' summed `counts` ask for."""
        self._agreed |= {word for word, count in zip(WORDS, summed, strict=True) if count}

    @property
    def stop(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return bool(self._agreed - {SAVE})

    @property
    def save(self) -> bool:
        """Whether the ranks have agreed to save."""
        return SAVE in self._agreed

    @property
    def reason(self) -> str:
        """Why the run stops: ``SIGTERM``, ``SIGUSR1``, ``STOP``, or several of them."""
        return ", ".join(word for word in WORDS if word in self._agreed - {SAVE})

    def saved(self) -> None:
        """A checkpoint was written: SAVE is honoured, and removed where this rank looks for it."""
        if self.save and self._folder is not None:
            (self._folder / SAVE).unlink(missing_ok=True)
        self._agreed.discard(SAVE)

    def stopped(self) -> None:
        """The run has stopped, or finished: STOP is honoured, and removed where this rank looks for it."""
        if self._folder is not None:
            (self._folder / STOP).unlink(missing_ok=True)


@contextlib.contextmanager
def listening() -> Iterator[Requests]:
    """Note SIGTERM and SIGUSR1 instead of ending by them, until the context ends.

    Hears nothing outside of the main thread.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, requests.hear) for number in SIGNALS}
    for number in SIGNALS:
        signal.siginterrupt(number, False)  # libraries below may not expect system calls that end early
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass(frozen=True)
class Cleared:
    """What the run before left: lines for the log, and whether it was stopped before it had any checkpoint."""

    notes: tuple[str, ...] = ()
    nothing_saved: bool = False


def clear(folder: Path) -> Cleared:
    """Remove ``stopped.json`` and ``STOP`` of the run before from its output folder."""
    notes, nothing_saved = [], False
    record = folder / STOPPED_FILE
    if record.exists():
        with contextlib.suppress(ValueError, AttributeError):
            nothing_saved = json.loads(record.read_text(encoding="utf-8")).get("checkpoint", "") is None
        record.unlink()
        notes.append(f"removed {record} of the run before")
    if (folder / STOP).exists():
        (folder / STOP).unlink()
        notes.append(f"removed {folder / STOP}, made before this run started")
    return Cleared(tuple(notes), nothing_saved)


def record(path: Path, step: int, checkpoint: Path | None, more: Mapping[str, object]) -> None:
    """Write how the run ended: step, checkpoint, the time and ``more``, as JSON, whole or not at all."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps(
        {"step": step, **more, "time": now, "checkpoint": None if checkpoint is None else str(checkpoint)}
    )
    write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears with all of its text, durable, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
