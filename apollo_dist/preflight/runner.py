"""The course of a preflight: meet, find out, compare, measure, tell."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from apollo_dist.pretrain.versions import node

from . import checks
from .checks import FAILED, NOTE, Row
from .facts import Facts, find_out, written
from .network import Measured, measure
from .rendezvous import Lost, Rendezvous

if TYPE_CHECKING:
    from .limits import Limits

# Shares of the time that a preflight has, after which it goes on without who is absent.
COME, REPORT, MEASURE = 0.5, 0.7, 0.9
SEEN_SECONDS = 5.0  # shared storage may show what others wrote a little later
FAREWELL_SECONDS = 3.0  # how long the rank that holds the store waits for the others to have read the verdict


def preflight(limits: Limits, arguments: Sequence[str], seconds: float) -> int:
    """Run all checks; the table is printed on rank 0. Returns 0, or 1 on every rank where something is not well.

    Args:
        limits: what is expected.
        arguments: options of ``apollo_dist.pretrain``.
        seconds: for all of it, from now.
    """
    began = time.monotonic()
    try:
        rendezvous = Rendezvous(COME * seconds)
        rendezvous.say("arrived", node())
        course = _First if rendezvous.rank == 0 else _Other
        code = course(rendezvous, limits, list(arguments), began, seconds).run()
    except (Lost, ValueError) as error:
        print(f"preflight: {error}", file=sys.stderr, flush=True)
        return 1
    if rendezvous.world > 1:
        # A collective that hangs, or a process group whose other end is gone, must not keep this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


class _Course:
    def __init__(
        self, rendezvous: Rendezvous, limits: Limits, arguments: list[str], began: float, seconds: float
    ) -> None:
        self._rendezvous, self._limits, self._arguments = rendezvous, limits, arguments
        self._began, self._seconds = began, seconds

    def _by(self, share: float) -> float:
        return self._began + share * self._seconds

    def _find_out(self, token: str) -> Facts:
        try:
            facts = find_out(self._rendezvous.rank, self._rendezvous.world, self._arguments, token)
        except Exception as error:  # a broken GPU driver, for one
            facts = Facts(self._rendezvous.rank, node(), {}, problem=f"{type(error).__name__}: {error}")
        self._rendezvous.say("facts", dataclasses.asdict(facts))
        return facts

    def _measure(self, nodes: list[str]) -> None:
        """Measure in a thread, since a collective may never return, and publish the result or the error."""
        left = max(self._by(MEASURE) - time.monotonic(), 1.0)

        def work() -> None:
            try:
                gpu = torch.cuda.is_available()
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
                store = dist.PrefixStore("group", self._rendezvous.store)  # type: ignore[attr-defined]
                found = dataclasses.asdict(measure(store, self._rendezvous.rank, nodes, device, left))
            except Exception as error:  # whatever it is, rank 0 prints it
                found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            self._rendezvous.say("measured", found)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(left)


class _Other(_Course):
    def run(self) -> int:
        rendezvous = self._rendezvous
        token = rendezvous.wait_for_first("token", self._by(COME))
        facts = self._find_out(token)
        nodes = rendezvous.wait_for_first("nodes", self._by(MEASURE))
        if nodes:
            self._measure(nodes)
        code: int = rendezvous.wait_for_first("verdict", self._by(1.0) + SEEN_SECONDS)
        rendezvous.say("left", True)
        if facts.folder:  # storage that rank 0 does not see
            with contextlib.suppress(OSError):
                written(Path(facts.folder), token, rendezvous.rank).unlink(missing_ok=True)
        return code


class _First(_Course):
    def run(self) -> int:
        rendezvous = self._rendezvous
        everyone = range(rendezvous.world)
        token = secrets.token_hex(4)
        rendezvous.say("token", token)
        finding = threading.Thread(target=self._find_out, args=(token,), daemon=True)
        finding.start()
        absent = rendezvous.missing("arrived", everyone, self._by(COME))
        here = [rank for rank in everyone if rank not in absent]
        silent = rendezvous.missing("facts", here, self._by(REPORT if not absent else COME) + 1.0)
        nodes = {rank: rendezvous.hear("arrived", rank) for rank in here}
        facts = [Facts(**rendezvous.hear("facts", rank)) for rank in here if rank not in silent]
        problems = {each.rank: each.problem for each in facts if each.problem}
        rows = [checks.ranks_row(rendezvous.world, absent, silent, problems, nodes, self._limits)]
        if facts and not problems:
            rows += [
                checks.gpu_row(facts, nodes, self._limits),
                checks.versions_row(facts, nodes),
                checks.recipe_row(facts, nodes),
                checks.disk_row(facts, _unseen(facts, token), nodes, self._limits),
            ]
        if absent or silent or problems:
            rows.append(Row("network", NOTE, "not tried: ranks are missing"))
        else:
            rows += self._network(facts, nodes)
        code = int(any(row.state == FAILED for row in rows))
        print(f"preflight of {rendezvous.world} rank(s), {time.monotonic() - self._began:.1f} s\n{checks.table(rows)}")
        print("preflight: " + ("failed" if code else "all is well"), flush=True)
        rendezvous.say("nodes", [])
        rendezvous.say("verdict", code)
        if rendezvous.hosts:
            rendezvous.missing("left", [r for r in here if r], time.monotonic() + FAREWELL_SECONDS)
        return code

    def _network(self, facts: list[Facts], nodes: dict[int, str]) -> list[Row]:
        rendezvous = self._rendezvous
        if len({bool(each.gpu) for each in facts}) > 1 or any(each.gpus and not each.gpu for each in facts):
            return [Row("network", NOTE, "not tried: some ranks have a GPU and some have none")]
        ordered = [nodes[rank] for rank in range(rendezvous.world)]
        rendezvous.say("nodes", ordered)
        self._measure(ordered)
        late = rendezvous.missing("measured", range(rendezvous.world), self._by(MEASURE) + 1.0)
        found = {rank: rendezvous.hear("measured", rank) for rank in range(rendezvous.world) if rank not in late}
        problems = {rank: each["error"] for rank, each in found.items() if "error" in each}
        problems |= dict.fromkeys(late, "no end of the collectives in time")
        if problems:
            remedy = (
                "do the machines reach each other? Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, and NCCL_DEBUG=INFO"
            )
            return [Row("network", FAILED, checks.groups(problems, nodes), remedy)]
        measured = {rank: Measured(**each) for rank, each in found.items()}
        return checks.network_rows(measured, nodes, self._limits)


def _unseen(facts: list[Facts], token: str) -> list[int]:
    """Ranks whose file of the write test this rank does not see, after some patience; removes those that it sees."""
    own = next((each.folder for each in facts if each.rank == 0), "")
    left = {each.rank for each in facts if own and each.folder and not each.folder_problem}
    until = time.monotonic() + SEEN_SECONDS
    while left:
        for rank in sorted(left):
            path = written(Path(own), token, rank)
            if path.exists():
                path.unlink(missing_ok=True)
                left.discard(rank)
        if time.monotonic() > until:
            break
        time.sleep(0.1 if left else 0.0)
    return sorted(left)
