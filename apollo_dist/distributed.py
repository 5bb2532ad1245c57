"""Errors that end on every rank: facts compared, and local failures shared, before anything is exchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def _distributed(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def rank_of(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in ``group``, by default among all; 0 without torch.distributed."""
    return dist.get_rank(group) if _distributed(group) else 0


def world_of(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks ``group`` has, by default all; 1 without torch.distributed."""
    return dist.get_world_size(group) if _distributed(group) else 1


def run_together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``work`` on every rank of ``group``; if it fails on any, raise on all of them.

    A collective: every rank must call it. Work that itself communicates can still hang where one rank leaves it early;
    pass only local work.

    Args:
        work: takes nothing; its result is returned.
        group: the ranks, default all.

    Raises:
        ValueError: on every rank, naming the first rank that failed and its error; on ranks that failed themselves
            their own error is chained.
    """
    if not _distributed(group):
        return work()
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as exc:
        error = exc
    message = None if error is None else f"{type(error).__name__}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, message, group=group)
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise ValueError(f"rank {rank}: {failure}") from error
    return result  # type: ignore[return-value]


def run_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``work`` on the first rank of ``group`` only, and give every rank its (picklable) result.

    A collective: every rank must call it.

    Raises:
        ValueError: on every rank, if the work fails on the first.
    """
    if not _distributed(group):
        return work()
    result: T | None = None
    error: Exception | None = None
    first = dist.get_rank(group) == 0
    if first:
        try:
            result = work()
        except Exception as exc:
            error = exc
    shared: list[Any] = [None if error is None else f"{type(error).__name__}: {error}", result]
    dist.broadcast_object_list(shared, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if shared[0] is not None:
        raise ValueError(f"rank 0: {shared[0]}") from error
    return shared[1]  # type: ignore[no-any-return]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of ``group``, in rank order; a collective, for small picklable objects."""
    if not _distributed(group):
        return [value]
    everyone: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone  # type: ignore[return-value]


def agree(facts: Mapping[str, object], group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks of ``group`` hold the same facts.

    A collective: every rank must call it. Facts are compared by ``repr``; usually only a digest travels.

    Args:
        facts: what must be equal, by name.
        group: the ranks, default all.

    Raises:
        ValueError: the same on every rank, naming the first rank that differs from rank 0 and the first difference.
    """
    if not _distributed(group):
        return
    mine = {key: repr(value) for key, value in facts.items()}
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    world = dist.get_world_size(group)
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) == 1:
        return
    everyone: list[dict[str, str]] = [{} for _ in range(world)]
    dist.all_gather_object(everyone, mine, group=group)
    for rank in range(1, world):
        difference = _first_difference(everyone[0], everyone[rank])
        if difference:
            raise ValueError(f"ranks disagree: {difference.format(rank=rank)}")
    raise ValueError("ranks disagree on the order of what they compare; they run different code")


def _first_difference(first: Mapping[str, str], other: Mapping[str, str]) -> str:
    for key in [*first, *(k for k in other if k not in first)]:
        if key not in other:
            return _literal(f"{key} is {_short(first[key])} on rank 0 and missing on rank ") + "{rank}"
        if key not in first:
            return _literal(f"{key} is {_short(other[key])} on rank ") + "{rank}" + _literal(" and missing on rank 0")
        if first[key] != other[key]:
            return _literal(f"{key} is {_short(first[key])} on rank 0 and {_short(other[key])} on rank ") + "{rank}"
    return ""


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
