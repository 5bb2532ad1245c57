"""Run a function on several spawned gloo ranks, with a file rendezvous and a short timeout."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 60


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """``fn(rank, world, *args)`` on every rank; the results, in rank order.

    Raises:
        AssertionError: with the rank's traceback if a rank fails, or if the ranks do not end in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, args=(world, folder, fn, args), nprocs=world, join=False, start_method="spawn"
        )
        ended = False
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        try:
            while not ended and datetime.datetime.now() < deadline:
                ended = context.join(timeout=5)
        except Exception as exc:
            raise AssertionError(_failures(folder) or str(exc)) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        assert ended, f"ranks did not end within {timeout} s\n{_failures(folder)}"
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world)]


def _failures(folder: str) -> str:
    return "\n".join(path.read_text() for path in sorted(Path(folder).glob("failure-*")))


def _rank(rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    try:
        result = fn(rank, world, *args)
        torch.save(result, Path(folder) / f"result-{rank}")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"failure-{rank}").write_text(f"rank {rank} of {world}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
    # Not through Python's own end: it stops torch's C++ threads when they ask for the interpreter, and one time in some
    # thousands that is inside of a function that must not be left so ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
