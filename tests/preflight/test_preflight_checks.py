"""The rows of a preflight's table that one machine without GPUs cannot bring about."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from apollo_dist.preflight.checks import Row, disk_row, gpu_row, groups, network_rows, ranks_row, table, who
from apollo_dist.preflight.facts import Facts, parameters
from apollo_dist.preflight.limits import Limits, gigabytes
from apollo_dist.preflight.network import Measured, edges
from apollo_dist.pretrain.model import build_model, model_facts
from apollo_dist.pretrain.settings import load_settings

NODES = {0: "a", 1: "a", 2: "b", 3: "b"}
GPU = Facts(0, "a", {}, gpus=2, gpu="A100", gpu_memory=85_000_000_000, gpu_free=84_000_000_000)


def facts(*changes: dict[str, object]) -> list[Facts]:
    return [dataclasses.replace(GPU, rank=rank, node=NODES[rank], **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]


def test_gpus() -> None:
    alike = facts({}, {}, {}, {})
    row = gpu_row(alike, NODES, Limits(gpu_memory=gigabytes("80GB")))
    assert (row.state, row.found) == ("ok", "A100, 85 GB on ranks 0 to 3 (a, b)")
    row = gpu_row(facts({}, {}, {}, {"gpu_memory": 40 * 10**9}), NODES, Limits(gpu_memory=gigabytes("80GB")))
    assert row.state == "FAIL"
    assert "below 80 GB: rank 3 (b)" in row.found
    row = gpu_row(facts({}, {}, {"gpu": "", "gpus": 0}, {}), NODES, Limits())
    assert row.state == "FAIL"
    assert "no GPU of its own: 0 GPU(s) on rank 2 (b)" in row.found
    row = gpu_row(facts({}, {"gpu_free": 20 * 10**9}, {}, {}), NODES, Limits())
    assert row.state == "note"
    assert "65 GB taken on rank 1 (a)" in row.found


def measured(**changes: dict[int, object]) -> dict[int, Measured]:
    pairs = {0: {"2": 8e9}, 1: {}, 2: {"0": 9e9}, 3: {}}
    return {
        rank: dataclasses.replace(
            Measured(0, 0.5, 10**9, 0.01, [100.0, 101.0, 102.0], pairs[rank]),
            **{key: by_rank[rank] for key, by_rank in changes.items() if rank in by_rank},  # type: ignore[arg-type]
        )
        for rank in range(4)
    }


def test_clocks_sums_bandwidth_and_speed() -> None:
    rows = network_rows(measured(), NODES, Limits(bandwidth=2.9))
    assert [row.state for row in rows] == ["ok"] * 4
    assert "all_reduce 3.00 GB/s on the bus; slowest link" in rows[2].found

    clocks, *_ = network_rows(measured(clocks={2: [90.0, 91.0, 93.0]}), NODES, Limits())
    assert clocks.state == "FAIL"
    assert "10.0 s between clocks; rank 2 (b) is -10.0 s off the others" in clocks.found

    sums = network_rows(measured(wrong={3: 7}), NODES, Limits())[1]
    assert sums.state == "FAIL"
    assert "7 elements on rank 3 (b)" in sums.found

    speed = network_rows(measured(compute_seconds={3: 0.03}), NODES, Limits())[3]
    assert speed.state == "note"
    assert "slowest node b: 30.00 ms for what takes the median rank 10.00" in speed.found


def test_numbers_of_ranks() -> None:
    assert ranks_row(4, [], [], {}, NODES, Limits(nodes=2, ranks_per_node=2)).state == "ok"
    lopsided = {**NODES, 1: "b"}
    row = ranks_row(4, [], [], {}, lopsided, Limits(ranks_per_node=2))
    assert row.state == "FAIL"
    assert "a 1, b 3; expected 2 on each, not so on a, b" in row.found
    row = ranks_row(4, [], [3], {}, NODES, Limits())
    assert row.state == "FAIL"
    assert "rank 3 (b) came, but found nothing out in time" in row.found
    row = ranks_row(4, [], [], {3: "RuntimeError: CUDA error: uncorrectable ECC error"}, NODES, Limits())
    assert row.state == "FAIL"
    assert "uncorrectable ECC error on rank 3 (b)" in row.found


def test_room_for_checkpoints() -> None:
    room = {"folder": "/out", "free_disk": 10**9, "needed_disk": 2 * 10**9}
    row = disk_row(facts(room, room), [], NODES, Limits())
    assert row.state == "FAIL"
    assert "needs 2.0 GB" in row.found
    assert disk_row(facts(room, room), [], NODES, Limits(free_disk=10**8)).state == "ok"


def test_pairs_cover_the_ring_of_machines() -> None:
    assert edges(["a"]) == []
    assert edges(["a", "a"]) == [[(0, 1)]]
    assert edges(["a", "a", "b", "b"]) == [[(0, 2)]]
    for count in range(3, 8):
        rounds = edges([f"n{k // 2}" for k in range(2 * count)])
        for pairs in rounds:
            members = [rank for pair in pairs for rank in pair]
            assert len(set(members)) == len(members)
        assert {frozenset(pair) for pairs in rounds for pair in pairs} == {
            frozenset((2 * k, 2 * ((k + 1) % count))) for k in range(count)
        }


def test_words() -> None:
    assert who([3], NODES) == "rank 3 (b)"
    assert who([0, 1, 2, 3], NODES) == "ranks 0 to 3 (a, b)"
    assert who([0, 3], NODES) == "ranks 0, 3 (a, b)"
    assert who([7], NODES) == "rank 7"
    assert groups({0: "x", 1: "y", 2: "x"}, NODES) == "x on ranks 0, 2 (a, b); y on rank 1 (a)"
    text = table([Row("GPU", "ok", "fine", "unused"), Row("clocks", "FAIL", "late", "do this")])
    assert text == "  ok    GPU     fine\n  FAIL  clocks  late\n                -> do this"


def test_amounts() -> None:
    assert gigabytes("80") == gigabytes("80GB") == gigabytes("80 gb") == 80 * 10**9
    assert gigabytes("1.5GiB") == 3 * 2**29
    for wrong in ("", "GB", "80XB", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no amount of memory"):
            gigabytes(wrong)


def test_parameters_are_those_of_the_model() -> None:
    config = load_settings([]).config
    facts = model_facts(build_model(config.model, config.sequence_length, 0))
    assert parameters(config.model) == facts["parameters"]
