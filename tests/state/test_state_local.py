"""``state_dict()`` is local under DTensor too, and torchtitan's way to save and load continues to the same bits."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from apollo_dist import APOLLO

from ..optimizers.torch_suite import problem, same, take
from ..ranks import run_ranks
from ..versions import MISSING_STATES, needs_fsdp2, needs_no_dist
from .state_runs import alone, quietly


@pytest.mark.parametrize(
    ("engine", "world"), [("fsdp2", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow),
                          pytest.param("tp alternating", 4, marks=pytest.mark.slow)]
)  # fmt: skip
def test_one_rank_alone_may_ask_and_files_by_rank_continue(engine, world):
    results = run_ranks(alone, world, engine, timeout=120)
    assert results[1]["kinds"] == ["DTensor", "OwnedTensor"]
    assert results[1]["shown"] == {"DTensor", "OwnedTensor", "list"}
    for found in results:
        assert found["same"]
        assert not found["held"]
        assert found["still new"]
        assert "the loaded state was made with projections of seed 9" in found["seed on rank 1"]
        assert "ranks disagree: loaded state of embed.norm" in found["missing on rank 1"]
        assert "ranks disagree: loaded state of" in found["steps differ"]


@needs_fsdp2
def test_torchtitans_flat_state_dict_resumes_to_the_same_bits(tmp_path):
    for found in run_ranks(quietly, 2, str(tmp_path), timeout=120):
        assert not found["held"]
        assert found["names"] > 20
        assert found["weights"]
        assert found["moments"]
        assert found["count"] > 100
        assert found["lost"] == ["layers.1.linear.weight"] * MISSING_STATES
        assert found["then"] == [1.0, 7.0][-1 - MISSING_STATES :]
        assert "with projections of seed 3, and here the seed is 8" in found["seed"]


@needs_no_dist
def test_a_checkpoint_of_version_0_1_loads_partially(tmp_path):
    """Written by torch.distributed.checkpoint without seed and version, and with ``step`` as a number."""
    params, loss = problem()
    model = nn.ParameterList(params)
    optimizer = APOLLO(params, rank=2)
    take(optimizer, loss, 3)
    state = get_optimizer_state_dict(model, optimizer)
    for group in state["param_groups"]:
        del group["seed"], group["state_version"]
    for one in state["state"].values():
        one["step"] = int(one["step"])
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    twins, of_twins = problem()
    with torch.no_grad():
        for p, q in zip(twins, params, strict=True):
            p.copy_(q)
    model, other = nn.ParameterList(twins), APOLLO(twins, rank=2)
    other.accept_at_load("projections")
    state = {"optimizer": get_optimizer_state_dict(model, other)}
    partially = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path, planner=partially, no_dist=True)
    set_optimizer_state_dict(model, other, state["optimizer"])
    take(optimizer, loss, 3)
    take(other, of_twins, 3)
    assert same(params, twins)


def test_new_state_never_exists_twice():
    """A batch's matrices have theirs in one tensor, and need none of their own before it."""
    optimizer = APOLLO(nn.Sequential(*[nn.Linear(64, 512, bias=False) for _ in range(8)]), rank=32)
    with MemTracker() as tracker:
        optimizer.prepare()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert 0 < optimizer.state_bytes() <= peak < 1.01 * optimizer.state_bytes()
