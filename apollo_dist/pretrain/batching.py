"""How a step's sequences are divided: over ranks, then over forward passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """``batch_size = micro * accumulation * world`` sequences per step."""

    batch_size: int
    micro: int  # sequences per rank and forward pass
    accumulation: int  # forward passes per step
    world: int


def plan_batch(batch_size: int, micro: int | None, world: int) -> BatchPlan:
    """Divide ``batch_size`` sequences; ``micro`` None means one forward pass per step.

    Raises ValueError, with the numbers, where it does not come out even.
    """
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide by {world} ranks: pass a multiple of {world}")
    micro = batch_size // world if micro is None else micro
    accumulation, rest = divmod(batch_size, micro * world)
    if rest or not accumulation:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of micro_batch_size {micro} x {world} ranks = {micro * world}: "
            "change one of them"
        )
    return BatchPlan(batch_size, micro, accumulation, world)
