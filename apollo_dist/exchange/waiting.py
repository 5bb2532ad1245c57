"""Waiting for a collective in which a rank may never take part, because it failed in the middle of a step.

Ranks do not meet before every collective of every step, which would cost more than the collectives themselves. A rank
that fails writes its error into the store of the rendezvous instead, and a rank that waits on the CPU looks there each
second. On accelerators the host does not wait for a collective: there the launcher ends the other ranks when the one
that failed has ended, as it does for any other failure of a training script.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import RankError, described, raised_together, world_of

# Seconds between two looks into the store.
_LOOK_EVERY = 1.0

# Numbers of alarms by the name of their group: the same on all of its ranks, since alarms are made together.
_numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
_armed: ContextVar[Alarm | None] = ContextVar("apollo_dist_alarm", default=None)


class Alarm:
    """Where ranks of one process group say that they failed in the middle of a step.

    Every rank of the group makes it at the same point of the run; that takes no communication.

    Args:
        group: the ranks, default all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group, self._key = group, ""
        self._store: Any = None
        if world_of(group) > 1:
            known = dist.group.WORLD if group is None else group
            assert known is not None
            name = known.group_name
            self._key = f"apollo_dist/failed/{name}/{next(_numbers[name])}"
            self._store = dist.distributed_c10d._get_default_store()

    @contextmanager
    def armed(self) -> Iterator[None]:
        """A block whose failure on this rank is told to the others, and in which ``wait`` hears of theirs."""
        before = _armed.set(self)
        try:
            yield
        except BaseException as error:
            told = isinstance(error, RankError) or raised_together(error, self._group)
            if self._store is not None and not told:
                self._store.set(self._key, f"{dist.get_rank()}\n{described(error)}")
            raise
        finally:
            _armed.reset(before)

    def heard(self) -> RankError | None:
        """Another rank's failure; None if there was none so far. Asks the store."""
        try:
            if self._store is None or not self._store.check([self._key]):
                return None
            rank, _, text = self._store.get(self._key).decode().partition("\n")
        except RuntimeError:  # the store ended with the rank that kept it
            return None
        return RankError.of(int(rank), text)


def wait(work: dist.Work, device: torch.device) -> None:
    """Wait for a collective that was started with ``async_op=True``, as the collective itself would have.

    Args:
        work: what it returned.
        device: of its tensors.

    Raises:
        RankError: if a rank told of its failure within ``Alarm.armed`` while this one waited.
    """
    alarm = _armed.get()
    if alarm is None or device.type != "cpu":
        work.wait()
        return
    while True:
        try:
            work.wait(timedelta(seconds=_LOOK_EVERY))
            return
        except RuntimeError:
            failure = alarm.heard()
            if failure is not None:
                raise failure from None
            if work.is_completed():  # with an error of its own, such as a closed connection
                raise
