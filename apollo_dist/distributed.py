"""Errors that end on every rank: local failures are shared before anything is exchanged, and facts are compared.

A collective in which one rank is missing waits for minutes and then ends with an error that names no cause. So local
work that may fail on one rank stands inside of ``together`` (or ``run_together``), and every collective inside of such
a block stands behind ``meet``. Steps after the first one cannot afford that; ``exchange/waiting.py`` says what they do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

# How much of another rank's error a message repeats.
_LONGEST = 2000


class RankError(RuntimeError, ValueError):
    """Another rank failed; this one did not, and ends what they did together.

    The rank that failed raises its own error with its own type. This class is a ValueError as well, since most such
    errors are bad arguments, which then can be handled alike on all ranks.

    Attributes:
        rank: the first rank that failed, counted over all ranks of the job.
    """

    rank: int = 0

    @staticmethod
    def of(rank: int, error: str) -> RankError:
        """The error that says that ``rank`` failed with ``error``."""
        made = RankError(f"rank {rank}: {error}")
        made.rank = rank
        return made


def _distributed(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def rank_of(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in ``group``, by default among all; 0 without torch.distributed."""
    return dist.get_rank(group) if _distributed(group) else 0


def world_of(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks ``group`` has, by default all; 1 without torch.distributed."""
    return dist.get_world_size(group) if _distributed(group) else 1


# The innermost ``together`` block that this thread is in: its group, and whether it has one.
_block: ContextVar[tuple[dist.ProcessGroup | None] | None] = ContextVar("apollo_dist_together", default=None)


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A block that fails on every rank of ``group`` if it fails on one. A collective: every rank must enter it.

    Collectives inside of it must stand behind ``meet()``, equally many on every rank. A rank that fails tells the
    others when they meet next, at the latest at the end of the block.

    Raises:
        RankError: on the ranks that did not fail, naming the first one that did. A rank that failed raises its own
            error.
    """
    if not _distributed(group):
        yield
        return
    outer = _block.set((group,))
    try:
        yield
    except BaseException as error:
        if not raised_together(error, group):
            _share(error, None, group)
        raise
    finally:
        _block.reset(outer)
    _share(None, None, group)


def meet() -> None:
    """Wait for all ranks of the innermost ``together`` block; outside of one, do nothing.

    Raises:
        RankError: if another rank left the block with an error.
    """
    block = _block.get()
    if block is not None:
        _share(None, None, block[0])


def raised_together(error: BaseException, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks of ``group`` know of an error and raise one as well."""
    return any(known is _key(group) for known in getattr(error, "_apollo_dist_shared", ()))


def _key(group: dist.ProcessGroup | None) -> object:
    return dist.group.WORLD if group is None else group


def known_to_all(error: E, group: dist.ProcessGroup | None = None) -> E:
    """Note on an error that all ranks of ``group`` raise it, or know of it; returns it."""
    error._apollo_dist_shared = (*getattr(error, "_apollo_dist_shared", ()), _key(group))  # type: ignore[attr-defined]
    return error


def _share(error: BaseException | None, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's ``value``; a RankError if another rank has an error and this one has none. A collective."""
    mine = (None if error is None else described(error), value)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, mine, group=group)
    except BaseException as failure:
        # The others cannot be reached, so an error of this rank's own says more than this one.
        known_to_all(failure, group)
        if error is None:
            raise
        known_to_all(error, group)
        return []
    failed = {rank: text for rank, (text, _) in enumerate(everyone) if text is not None}
    if error is not None:
        known_to_all(error, group)
    elif failed:
        first, *others = (global_rank(rank, group) for rank in failed)
        also = f" (so did ranks {', '.join(map(str, others))})" if others else ""
        raise known_to_all(RankError.of(first, next(iter(failed.values())) + also), group)
    return [given for _, given in everyone]


def described(error: BaseException) -> str:
    """An error's type and message, for the other ranks; the rest of a very long message is left out."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    """The rank in the whole job of the ``rank``-th of ``group``."""
    return rank if group is None else dist.get_global_rank(group, rank)


def run_together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``work`` on every rank of ``group``; if it fails on any, raise on all of them.

    A collective: every rank must call it.

    Args:
        work: takes nothing; its result is returned. It stands inside of ``together``.
        group: the ranks, default all.

    Raises:
        RankError: on the ranks that did not fail, naming the first one that did. A rank that failed raises its own
            error.
    """
    with together(group):
        return work()


def gather_together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What ``work`` (local, with a small picklable result) returns on every rank of ``group``, in rank order.

    A collective, as ``run_together`` is; fails as that.
    """
    if not _distributed(group):
        return [work()]
    try:
        result = work()
    except BaseException as error:
        _share(error, None, group)
        raise
    return _share(None, result, group)


def run_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``work`` on the first rank of ``group`` only, and give every rank its (picklable) result.

    A collective: every rank must call it.

    Raises:
        RankError: on the other ranks, if the work fails on the first, which raises its own error.
    """
    if not _distributed(group):
        return work()
    result: T | None = None
    error: BaseException | None = None
    first = dist.get_rank(group) == 0
    if first:
        try:
            result = work()
        except BaseException as exc:
            error = exc
    shared: list[Any] = [None if error is None else described(error), result]
    dist.broadcast_object_list(shared, src=global_rank(0, group), group=group)
    if error is not None:
        raise known_to_all(error, group)
    if shared[0] is not None:
        raise known_to_all(RankError.of(global_rank(0, group), shared[0]), group)
    return shared[1]  # type: ignore[no-any-return]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of ``group``, in rank order; a collective, for small picklable objects."""
    if not _distributed(group):
        return [value]
    everyone: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone  # type: ignore[return-value]


def check_same_on_all_ranks(
    facts: Mapping[str, object] | Callable[[], Mapping[str, object]],
    group: dist.ProcessGroup | None = None,
    explain: Callable[[str], str] = lambda fact: "",
) -> None:
    """Check that all ranks of ``group`` hold the same facts.

    A collective: every rank must call it. Facts are compared by ``repr``; usually only a digest travels.

    Args:
        facts: what must be equal, by name; or what finds that out, if that may fail on one rank.
        group: the ranks, default all.
        explain: what to do about a fact (by its name) that differs; added to the message.

    Raises:
        ValueError: the same on every rank, naming the first rank that differs from the first one and the first
            difference.
        RankError: if the facts could not be found out on another rank.
    """
    mine: dict[str, str] = {}

    def digest() -> str:
        mine.update((key, repr(value)) for key, value in (facts() if callable(facts) else facts).items())
        return hashlib.sha256(repr(mine).encode()).hexdigest()

    digests = gather_together(digest, group)
    if len(set(digests)) == 1:
        return
    everyone = gather(mine, group)
    for rank, other in enumerate(everyone):
        fact, difference = _first_difference(everyone[0], other, global_rank(0, group), global_rank(rank, group))
        if fact is not None:
            raise known_to_all(ValueError(f"ranks disagree: {difference}{explain(fact)}"), group)
    raise known_to_all(ValueError("ranks disagree on the order of what they compare; they run different code"), group)


def _first_difference(
    first: Mapping[str, str], other: Mapping[str, str], first_rank: int, rank: int
) -> tuple[str | None, str]:
    """The first fact that differs, None if none does, and what each of two ranks has of it."""
    for key in [*first, *(k for k in other if k not in first)]:
        if first.get(key) != other.get(key):
            was, now = (_short(facts[key]) if key in facts else "missing" for facts in (first, other))
            if key in first:
                return key, f"{key} is {was} on rank {first_rank} and {now} on rank {rank}"
            return key, f"{key} is {now} on rank {rank} and missing on rank {first_rank}"
    return None, ""


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def device_for(process_group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where a tensor on ``device`` has to be for a collective: NCCL cannot reach states offloaded to the CPU."""
    backends = dist.get_backend_config(process_group)
    if f"{device.type}:" in backends or ":" not in backends:
        return device
    return torch.accelerator.current_accelerator() or device
