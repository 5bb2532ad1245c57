"""Where the ranks of a preflight meet: a key-value store, which tells who is absent. Nothing here is a collective."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Lost(Exception):
    """This rank cannot go on: another did not come or did not answer. The text says which, and what to do."""


class Rendezvous:
    """The store of the launcher's rendezvous (torchrun's agent holds it, else rank 0), and this rank's place.

    Args:
        seconds: how long to wait for the store.

    Raises:
        Lost: if there is none in that time.
        ValueError: if the launcher's variables are incomplete.
    """

    def __init__(self, seconds: float) -> None:
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            self.rank, self.world, self.hosts = 0, 1, True
            self.store: Any = dist.HashStore()  # type: ignore[attr-defined]
            return
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if absent:
            raise ValueError(f"RANK is set but {' and '.join(absent)} not: start with torchrun, deepspeed or srun")
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.hosts = self.rank == 0 and not agents
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, None, self.hosts, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            who = "torchrun's agent" if agents else "rank 0"
            raise Lost(
                f"rank {self.rank}: {who} is missing: {host}:{port} did not answer within {seconds:.0f} s. "
                f"Look at its log; check that MASTER_ADDR is its address as seen from here, and that no firewall "
                f"closes the port ({str(error).splitlines()[0]})"
            ) from error
        # The training that is started after this one may meet in the same store.
        prefix = f"apollo_dist preflight {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]

    def say(self, what: str, value: object) -> None:
        """Publish ``value`` (JSON) of this rank."""
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def hear(self, what: str, rank: int) -> Any:
        """What a rank published; it must be there."""
        return json.loads(self.store.get(f"{what}/{rank}"))

    def missing(self, what: str, ranks: Iterable[int], until: float) -> list[int]:
        """The ranks that have not published ``what`` by the time ``until`` (``time.monotonic()``)."""
        left = list(ranks)
        while True:
            left = [rank for rank in left if not self.store.check([f"{what}/{rank}"])]
            if not left or time.monotonic() > until:
                return left
            time.sleep(0.05)

    def wait_for_first(self, what: str, until: float) -> Any:
        """What rank 0 published; Lost, with who else is absent, if it is not there in time."""
        if not self.missing(what, [0], until):
            return self.hear(what, 0)
        absent = self.missing("arrived", range(self.world), time.monotonic())
        who = f"absent: rank {', '.join(map(str, absent))}" if absent else "all ranks had come"
        raise Lost(f"rank {self.rank}: rank 0 gave no answer ({what}); {who}. Look at the log of rank 0")
