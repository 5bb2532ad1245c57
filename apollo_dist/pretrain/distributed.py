"""The ranks of a run: start and end of the process group, and work that succeeds or fails on all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from apollo_dist.distributed import described, raised_together, world_of

T = TypeVar("T")


class SetupError(ValueError):
    """An error that every rank raised together, with one message; the job ends with it and without a traceback."""


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, the one that prints and writes metrics."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` (local: no collectives inside) on every rank; collective.

        Where it fails on any rank, every rank raises SetupError as `share` does.
        """
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(work())
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        self.share(error)
        return result[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` (local) returns on rank 0, which alone runs it; picklable. Collective; fails as `together`."""
        return cast(T, self.gather(self.together(lambda: work() if self.first else None))[0])

    def share(self, error: Exception | None) -> None:
        """Raise SetupError on every rank if any has an ``error``; collective.

        All get the same message, which names the ranks unless all failed alike.
        """
        plain = isinstance(error, (ValueError, OSError))
        mine = None if error is None else str(error) if plain else f"{type(error).__name__}: {error}"
        everyone: list[str | None] = [None] * self.world
        dist.all_gather_object(everyone, mine)
        failed = {rank: text for rank, text in enumerate(everyone) if text is not None}
        if not failed:
            return
        texts = set(failed.values())
        if len(failed) == self.world and len(texts) == 1:
            raise SetupError(texts.pop()) from error
        raise SetupError("; ".join(f"rank {rank}: {text}" for rank, text in failed.items())) from error

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order; collective. For small picklable objects outside of a step."""
        everyone: list[T | None] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone  # type: ignore[return-value]

    def sum(self, values: torch.Tensor | Sequence[float]) -> list[float]:
        """Elementwise sum of 1-D ``values`` over the ranks, in float64; collective."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def max(self, value: int) -> int:
        """Largest ``value`` of all ranks; collective."""
        return max(self.gather(value))

    def barrier(self) -> None:
        """Wait for every rank; collective. Its own all-reduce, so that it runs on this rank's device."""
        self.sum([0.0])


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Turn an error that every rank raises, as those of APOLLO's are, into `SetupError`.

    Where only one rank failed it raises its own error, of any type, and the others a RankError. In a single process a
    file or folder that cannot be read or written counts as known to all; other types are faults, and keep their traces.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError):
            raise SetupError(str(error)) from error
        if raised_together(error) or (world_of() == 1 and isinstance(error, OSError)):
            raise SetupError(str(error) if isinstance(error, OSError) else described(error)) from error
        raise


@contextlib.contextmanager
def process_group(timeout_minutes: float) -> Iterator[Ranks]:
    """Join the launcher's process group (torchrun, deepspeed), or make one of a single process without any port.

    NCCL where there is CUDA, else gloo. A collective that waits longer than ``timeout_minutes`` raises. After an
    error the group is left as it is: tearing it down would wait for ranks that may be gone.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise SetupError(f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        with alike():  # RANK alone does not do: the error names what else the launcher has to set
            dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()
