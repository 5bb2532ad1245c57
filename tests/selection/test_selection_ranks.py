"""The choice under wrappers that need several ranks, and groups that are bad on one rank only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO
from apollo_dist.selection.choice import low_rank_names, of_model

from ..ranks import run_ranks


class Conv1D(nn.Module):
    """GPT-2's linear map, as transformers writes it: known by its class' name, also where FSDP2 renames the class."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n, m)), nn.Parameter(torch.zeros(m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class OwnLinear(nn.Module):
    """Known by its code only."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(m, n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Modules(nn.ModuleDict):
    """FSDP wants a forward pass; nothing calls it."""

    def forward(self) -> None: ...


def network() -> nn.Module:
    def block() -> nn.Module:
        return Modules(
            {
                "conv": Conv1D(12, 12), "own": OwnLinear(12, 12), "linear": nn.Linear(12, 12),
                "attention": nn.MultiheadAttention(12, 2), "table": nn.Embedding(5, 12), "norm": nn.LayerNorm(12),
            }
        )  # fmt: skip

    return Modules(
        {"embed": nn.Embedding(20, 12), "layers": nn.ModuleList([block(), block()]), "head": nn.Linear(12, 20)}
    )


WANTED = {
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in (
        "conv.weight", "own.weight", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"
    )
}  # fmt: skip


def wrapped(kind: str, world: int) -> nn.Module:
    model = network()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        for i, block in enumerate(model.layers):
            model.layers[i] = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        for name in ("conv", "own", "linear", "attention") if kind == "fsdp2, each map" else ():
            fully_shard(block[name], mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS = ("ddp", "fsdp1", "fsdp2", "fsdp2, each map")


def choices(world: int) -> dict[str, list[set[str]]]:
    found = {}
    for kind in KINDS:
        model = wrapped(kind, world)
        built = (
            APOLLO(model, rank=4),
            APOLLO(model.named_parameters(), rank=4, model=model),
            APOLLO(model.parameters(), rank=4, model=model),
        )
        found[kind] = [low_rank_names(of_model(model, 4))]
        for optimizer in built:
            (plan,) = optimizer.prepare()
            found[kind].append({m.shard.name for group_step in plan.shard_groups for m in group_step.matrices})
    return found


def bad_groups(rank: int) -> dict[str, Any]:
    """Groups that are bad on rank 1 only; afterwards the optimizer takes the group as if they had not come."""
    model = network()
    optimizer = APOLLO(model, rank=4)
    extra = nn.Parameter(torch.ones(12, 12))
    found = {}
    for case, bad in (("bare", [extra]), ("other name", [("layers.3.linear.weight", extra)])):
        try:
            optimizer.add_param_group({"params": bad if rank else [("layers.2.linear.weight", extra)]})
        except ValueError as error:
            found[case] = str(error)
    optimizer.add_param_group({"params": [("layers.2.linear.weight", extra)]})
    (plan,) = optimizer.prepare()
    found["low-rank"] = {m.shard.name for group_step in plan.shard_groups for m in group_step.matrices}
    return found


def everything(rank: int, world: int) -> dict[str, Any]:
    return {"choices": choices(world), "bad": bad_groups(rank)}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_change_nothing(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        assert all(found == WANTED for found in result["choices"][kind]), result["choices"][kind]


def test_a_group_that_is_bad_on_one_rank_is_an_error_on_both(results: list[dict[str, Any]]) -> None:
    assert results[0]["bad"]["bare"].startswith("rank 1: ValueError: ")
    for result in results:
        bad = result["bad"]
        assert "parameter group 2: 1 of 1 parameters, the first of shape (12, 12), came without" in bad["bare"]
        assert "ranks disagree: parameter layers.2.linear.weight is " in bad["other name"]
        assert bad["low-rank"] == WANTED | {"layers.2.linear.weight"}
