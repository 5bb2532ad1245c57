"""From what the ranks found out to the rows of the table: pure functions, run on rank 0."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .facts import Facts
    from .limits import Limits
    from .network import Measured

OK, FAILED, NOTE = "ok", "FAIL", "note"


@dataclass(frozen=True)
class Row:
    """One check: what was found, and what to do where that is not well."""

    name: str
    state: str
    found: str
    remedy: str = ""


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each, and the remedy of a failed one below it."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"  {row.state:4s}  {row.name:{width}s}  {row.found}")
        if row.remedy and row.state != OK:
            lines.append(f"        {'':{width}s}  -> {row.remedy}")
    return "\n".join(lines)


def who(ranks: Sequence[int], nodes: Mapping[int, str]) -> str:
    """``rank 3 (node b)``, ``ranks 8 to 15 (node b)``."""
    ranks = sorted(ranks)
    named = ", ".join(dict.fromkeys(nodes[rank] for rank in ranks if rank in nodes))
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        text = f"ranks {ranks[0]} to {ranks[-1]}"
    else:
        text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
    return f"{text} ({named})" if named else text


def groups(values: Mapping[int, str], nodes: Mapping[int, str]) -> str:
    """Who has which value: ``2.13 on rank 0 (a); 2.12 on ranks 1, 2 (b)``."""
    by_value: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        by_value.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on {who(ranks, nodes)}" for value, ranks in by_value.items())


def ranks_row(
    world: int,
    absent: Sequence[int],
    silent: Sequence[int],
    problems: Mapping[int, str],
    nodes: Mapping[int, str],
    limits: Limits,
) -> Row:
    """Whether all ranks came, from as many machines as expected."""
    per_node = {name: list(nodes.values()).count(name) for name in dict.fromkeys(nodes.values())}
    found = f"{len(nodes)} of {world} rank(s) on {len(per_node)} node(s): " + ", ".join(
        f"{name} {count}" for name, count in list(per_node.items())[:8]
    )
    if absent:
        remedy = "look at its log, and whether its machine runs and reaches MASTER_ADDR; leave a bad machine out"
        return Row("ranks", FAILED, f"{found}; {who(absent, nodes)} did not come", remedy)
    if silent:
        remedy = "its GPU driver or its file systems do not answer: leave that machine out"
        return Row("ranks", FAILED, f"{found}; {who(silent, nodes)} came, but found nothing out in time", remedy)
    if problems:
        return Row("ranks", FAILED, f"{found}; {groups(problems, nodes)}", "leave that machine out, or mend it")
    if limits.nodes not in (None, len(per_node)):
        remedy = "compare the launcher's number of nodes with --nodes; was a machine started without its rendezvous?"
        return Row("ranks", FAILED, f"{found}; expected {limits.nodes} node(s)", remedy)
    wrong = [name for name, count in per_node.items() if limits.ranks_per_node not in (None, count)]
    if wrong:
        remedy = "compare --nproc_per_node (torchrun), --num_gpus (deepspeed) or --ntasks-per-node with it"
        expected = f"{found}; expected {limits.ranks_per_node} on each, not so on {', '.join(wrong)}"
        return Row("ranks", FAILED, expected, remedy)
    return Row("ranks", OK, found)


def gpu_row(facts: Sequence[Facts], nodes: Mapping[int, str], limits: Limits) -> Row:
    """Whether every rank has a GPU of its own, all alike and large enough; or none has any."""
    least = limits.gpu_memory
    if not any(each.gpus for each in facts):
        if least:
            return Row("GPU", FAILED, "no GPU on any rank", "load the CUDA module, or ask the scheduler for GPUs")
        return Row("GPU", OK, "no GPU: gloo on CPUs")
    without = [each for each in facts if not each.gpu]
    if without:
        counts = groups({each.rank: f"{each.gpus} GPU(s)" for each in without}, nodes)
        remedy = "look at nvidia-smi there; start as many ranks on a machine as it has GPUs"
        return Row("GPU", FAILED, f"no GPU of its own: {counts}", remedy)
    gigabytes = {each.rank: f"{each.gpu}, {each.gpu_memory / 1e9:.0f} GB" for each in facts}
    found = groups(gigabytes, nodes)
    small = [each.rank for each in facts if least and each.gpu_memory < least]
    if small and least:
        small_text = f"{found}; below {least / 1e9:g} GB: {who(small, nodes)}"
        return Row("GPU", FAILED, small_text, "ask the scheduler for the larger GPUs, or lower --min_gpu_memory")
    taken = [each for each in facts if each.gpu_free < 0.9 * each.gpu_memory]
    if taken:
        used = {each.rank: f"{(each.gpu_memory - each.gpu_free) / 1e9:.0f} GB taken" for each in taken}
        return Row("GPU", NOTE, f"{found}; {groups(used, nodes)}", "another process holds memory: see nvidia-smi there")
    return Row("GPU", OK if len(set(gigabytes.values())) == 1 else NOTE, found)


def versions_row(facts: Sequence[Facts], nodes: Mapping[int, str]) -> Row:
    """Whether all ranks run the same software."""
    names = list(dict.fromkeys(name for each in facts for name in each.versions))
    values = {name: {each.rank: each.versions.get(name, "unknown") for each in facts} for name in names}
    differing = [f"{name} {groups(value, nodes)}" for name, value in values.items() if len(set(value.values())) > 1]
    if differing:
        remedy = "install the same environment on every machine, best once on shared storage; check PATH and PYTHONPATH"
        return Row("versions", FAILED, "; ".join(differing), remedy)
    return Row("versions", OK, ", ".join(f"{name} {value[facts[0].rank]}" for name, value in values.items()))


def recipe_row(facts: Sequence[Facts], nodes: Mapping[int, str]) -> Row:
    """Whether all ranks were given the same run, and one that can be read."""
    problems = {each.rank: each.options_problem for each in facts if each.options_problem}
    if problems:
        remedy = "correct the option or the file; recipes and JSON files must be readable on every machine"
        return Row("recipe", FAILED, groups(problems, nodes), remedy)
    keys = list(dict.fromkeys(key for each in facts for key in each.options))
    values = {key: {each.rank: each.options.get(key, "missing") for each in facts} for key in keys}
    differing = [key for key, value in values.items() if len(set(value.values())) > 1]
    if differing:
        shown = "; ".join(f"{key} is {groups(_short(values[key]), nodes)}" for key in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        return Row("recipe", FAILED, shown + more, "give every rank the same command line, and the same recipe file")
    first = facts[0].options
    return Row("recipe", OK, f"{first['recipe']}, {first['engine']}, {len(first)} options alike")


def _short(values: Mapping[int, str]) -> dict[int, str]:
    texts = {rank: text if len(text) <= 60 else text[:57] + "..." for rank, text in values.items()}
    if len(set(texts.values())) == 1:  # the beginnings alone are equal
        return {
            rank: f"a text of {len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"
            for rank, text in values.items()
        }
    return texts


def disk_row(facts: Sequence[Facts], unseen: Sequence[int], nodes: Mapping[int, str], limits: Limits) -> Row:
    """Whether every rank can write where checkpoints go, to storage that all share, with room for them.

    ``unseen``: ranks whose file rank 0 does not see.
    """
    if any(not each.folder for each in facts):
        return Row("checkpoints", NOTE, "not tried: the folder is not known on every rank")
    problems = {each.rank: each.folder_problem for each in facts if each.folder_problem}
    if problems:
        remedy = "make room, or correct permissions and mounts there; another place: --output"
        return Row("checkpoints", FAILED, f"cannot write: {groups(problems, nodes)}", remedy)
    if unseen:
        remedy = "--output must be on storage that all machines share, at the same path"
        return Row("checkpoints", FAILED, f"rank 0 does not see what {who(unseen, nodes)} wrote", remedy)
    least = min(facts, key=lambda each: each.free_disk)
    found = f"{least.free_disk / 1e9:,.1f} GB free in {Path(least.folder)}, every rank wrote there"
    needed = limits.free_disk if limits.free_disk is not None else max(each.needed_disk for each in facts)
    if least.free_disk < needed:
        what = "--min_free_disk" if limits.free_disk is not None else "the checkpoints that are kept and one more"
        found = f"{found}; {what} needs {needed / 1e9:,.1f} GB, on {who([least.rank], nodes)}"
        return Row("checkpoints", FAILED, found, "make room, lower --keep_checkpoints, or another place: --output")
    return Row("checkpoints", OK, found)


def network_rows(measured: Mapping[int, Measured], nodes: Mapping[int, str], limits: Limits) -> list[Row]:
    """Clocks, sums, bandwidth and speed, of all ranks."""
    return [
        _clock_row(measured, nodes, limits),
        _sum_row(measured, nodes),
        _bandwidth_row(measured, nodes, limits),
        _speed_row(measured, nodes),
    ]


def _clock_row(measured: Mapping[int, Measured], nodes: Mapping[int, str], limits: Limits) -> Row:
    first = measured[0].clocks
    ahead = {r: statistics.median(b - a for a, b in zip(first, m.clocks, strict=True)) for r, m in measured.items()}
    middle = statistics.median(ahead.values())
    worst = max(ahead, key=lambda rank: abs(ahead[rank] - middle))
    spread = max(ahead.values()) - min(ahead.values())
    if spread > limits.clock_skew:
        found = f"{spread:.1f} s between clocks; {who([worst], nodes)} is {ahead[worst] - middle:+.1f} s off the others"
        return Row("clocks", FAILED, found, "start chrony or ntpd there, or raise --max_clock_skew")
    return Row("clocks", OK, f"within {spread:.3f} s")


def _sum_row(measured: Mapping[int, Measured], nodes: Mapping[int, str]) -> Row:
    wrong = {rank: f"{m.wrong:,} elements" for rank, m in measured.items() if m.wrong}
    if wrong:
        remedy = "leave that machine out, or try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to find the bad link"
        return Row("sums", FAILED, f"all_reduce gave wrong numbers: {groups(wrong, nodes)}", remedy)
    return Row("sums", OK, f"all_reduce over {len(measured)} rank(s) is exact")


def _bandwidth_row(measured: Mapping[int, Measured], nodes: Mapping[int, str], limits: Limits) -> Row:
    world = len(measured)
    if world == 1:
        return Row("bandwidth", OK, "one rank: nothing to measure")
    slowest = max(measured.values(), key=lambda m: m.reduce_seconds)
    bus = 2 * (world - 1) / world * slowest.reduce_bytes / slowest.reduce_seconds / 1e9
    links = {(min(a, int(b)), max(a, int(b))): rate for a, m in measured.items() for b, rate in m.pairs.items()}
    link = min(links, key=lambda pair: links[pair])
    found = (
        f"all_reduce {bus:.2f} GB/s on the bus; slowest link {links[link] / 1e9:.2f} GB/s, {who(link, nodes)} "
        f"(median {statistics.median(links.values()) / 1e9:.2f})"
    )
    if limits.bandwidth is not None and bus < limits.bandwidth:
        remedy = (
            "check that NCCL takes the fast interface (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA), leave the "
            "machine of the slowest link out, or lower --min_bandwidth"
        )
        return Row("bandwidth", FAILED, f"{found}; --min_bandwidth is {limits.bandwidth:g} GB/s", remedy)
    return Row("bandwidth", OK, found)


def _speed_row(measured: Mapping[int, Measured], nodes: Mapping[int, str]) -> Row:
    """A machine is as slow as its slowest rank; one that is much slower than the others holds all of them up."""
    by_node: dict[str, float] = {}
    for rank, m in measured.items():
        by_node[nodes[rank]] = max(by_node.get(nodes[rank], 0.0), m.compute_seconds)
    slowest = max(by_node, key=lambda name: by_node[name])
    middle = statistics.median(m.compute_seconds for m in measured.values())
    found = f"slowest node {slowest}: {by_node[slowest] * 1e3:.2f} ms for what takes the median rank {middle * 1e3:.2f}"
    if by_node[slowest] > 1.5 * middle:
        return Row("speed", NOTE, found, "other work or a hot GPU there? Training goes at the pace of the slowest")
    return Row("speed", OK, found)
