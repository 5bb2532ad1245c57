"""What only all ranks together can measure: sums over all of them, bandwidth, clocks, and who computes slowly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """One rank's; plain JSON."""

    wrong: int  # elements of the all_reduce that are not the sum
    reduce_seconds: float = 0.0  # of one all_reduce
    reduce_bytes: int = 0
    compute_seconds: float = 0.0  # of the same matrix products on every rank
    clocks: list[float] = field(default_factory=list)  # time.time() after each of some barriers
    pairs: dict[str, float] = field(default_factory=dict)  # bytes per second with a neighbouring rank, by its number


def measure(store: Any, rank: int, nodes: list[str], device: torch.device, seconds: float) -> Measured:
    """All measurements; collective. Makes the process group.

    Args:
        store: for the group.
        rank: of this process.
        nodes: the machine of every rank.
        device: where tensors are; NCCL on CUDA, else gloo.
        seconds: timeout of a collective.
    """
    world, cuda = len(nodes), device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )

    def barrier() -> None:
        dist.all_reduce(torch.zeros(1, device=device))
        if cuda:
            torch.cuda.synchronize()

    def timed(work: Callable[[], object]) -> float:
        """Seconds of one call: the median of some after a first one, each begun by all ranks at once."""
        taken = []
        for _ in range(ROUNDS + 1):
            barrier()
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])

    count = (64 if cuda else 2) << 20
    index = torch.arange(count, device=device) % 1021  # sums stay below 2^24, where fp32 is exact
    expected = (index * world + world * (world - 1) // 2).float()
    summed = (index + rank).float()
    dist.all_reduce(summed)
    wrong = int((summed != expected).sum())
    del expected, index
    return Measured(
        wrong,
        timed(lambda: dist.all_reduce(summed)),
        summed.nbytes,
        timed(_products(device)),
        [_clock(barrier) for _ in range(ROUNDS)],
        _with_neighbours(rank, nodes, device, timed),
    )


def _clock(barrier: Callable[[], None]) -> float:
    barrier()
    return time.time()


def _products(device: torch.device) -> Callable[[], object]:
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(10):
            a @ a

    return work


def edges(nodes: list[str]) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours to time, in rounds in which no rank is in two pairs.

    The first ranks of machines in a ring; the ranks themselves where there is one machine.
    """
    first = {name: rank for rank, name in reversed(list(enumerate(nodes)))}
    members = sorted(first.values()) if len(first) > 1 else list(range(len(nodes)))
    chain = list(pairwise(members))
    rounds = [chain[::2], chain[1::2]]
    if len(members) > 2:
        rounds.append([(members[-1], members[0])])
    return [pairs for pairs in rounds if pairs]


def _with_neighbours(
    rank: int, nodes: list[str], device: torch.device, timed: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    block = torch.zeros((16 if device.type == "cuda" else 1) << 20, device=device)
    found = {}
    for pairs in edges(nodes):
        other = next((b if a == rank else a for a, b in pairs if rank in (a, b)), None)
        lower = other is not None and rank < other

        def exchange(other: int | None = other, lower: bool = lower) -> None:
            if other is None:
                return
            for sends in (lower, not lower):
                if sends:
                    dist.send(block, other)
                else:
                    dist.recv(block, other)

        seconds = timed(exchange)
        if other is not None:
            found[str(other)] = 2 * block.nbytes / seconds
    return found
