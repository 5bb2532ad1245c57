"""The Hugging Face ``Trainer`` and Accelerate under FSDP, and parameters that are replaced under the optimizer.

The ``Trainer`` builds the optimizer from bare parameters, and Accelerate exchanges the parameters of one that exists.
The matrices and projections must still be those of ``APOLLO(model)``: a tiny real LLaMA is trained on two ranks and
compared with one process with whole matrices, to 1e-5 relative in fp32. All runs (``hugging_face_fsdp_runs.py``) share
one pair of processes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import apollo_dist

from ..judge import judge
from ..llama import RANK, assert_equal_to_one_process, llama
from ..ranks import run_ranks
from ..versions import BACKWARD_FAILS, BACKWARD_ON_CPU, needs_apollo_names
from .hugging_face_fsdp_runs import everything

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    if not BACKWARD_ON_CPU:
        pytest.skip(BACKWARD_FAILS)
    return run_ranks(everything, 2)


@pytest.mark.slow
def test_every_case_equals_one_process(results: list[dict[str, Any]]) -> None:
    for tool, engine in {"accelerate": "Accelerate, FSDP and DDP", "trainer": "Trainer, FSDP and DDP"}.items():
        judge([result[tool] for result in results], TOLERANCE, lambda _, engine=engine: engine, "float32")
    late = [{"fully_shard after APOLLO(model)": result["sharded after a model"]} for result in results]
    judge(late, TOLERANCE, lambda _: "FSDP2", "float32")


@pytest.mark.slow
def test_the_trainers_own_checkpoints_resume_exactly(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert all(result["resumed"].values()), result["resumed"]


@needs_apollo_names
@pytest.mark.slow
def test_optim_apollo_adamw_equals_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_equal_to_one_process(result["named"]["cases"])
        assert all(result["named"]["resumed"].values()), result["named"]["resumed"]


@needs_apollo_names
@pytest.mark.slow
def test_optim_apollo_adamw_layerwise_is_refused_where_gradients_are_not_whole(results: list[dict[str, Any]]) -> None:
    for result in results:
        refused = result["named"]["refused"]
        assert "on 2 ranks that hold whole parameters (DDP)" in refused["DDP"], refused
        assert "is sharded by FSDP1" in refused["FSDP1"], refused


@pytest.mark.slow
def test_the_choice_is_that_of_the_model(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["choices"] == ["layers.0.up.weight"]


@pytest.mark.slow
def test_whole_parameters_are_not_kept_in_memory(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["alive"] == 0


@pytest.mark.slow
def test_parameters_that_cannot_be_known_are_errors(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "21 parameters, among them mine.lm_head.weight, were replaced" in result["foreign"], result["foreign"]
        for case in ("parameters", "names"):
            message = result[f"sharded after {case}"]
            assert "none of the 21 parameters has a gradient or is sharded" in message, message
            assert "Build APOLLO after fully_shard, or as APOLLO(model)" in message


# Without processes.


def stepped(optimizer: apollo_dist.APOLLO, model: nn.Module) -> set[str]:
    """Names of the low-rank matrices in the state, after a step."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {name for name, slot in optimizer._parts.store.slots.items() if "last_norm" in slot}


def test_attached_parameters_are_those_of_the_model() -> None:
    models = [llama(), llama()]
    optimizers = [
        apollo_dist.APOLLO(models[0], rank=RANK, exclude="self_attn"),
        apollo_dist.APOLLO(models[1].parameters(), rank=RANK, exclude="self_attn"),
    ]
    optimizers[1].attach(models[1])
    for _ in range(2):
        chosen = [stepped(optimizer, model) for optimizer, model in zip(optimizers, models, strict=True)]
    assert chosen[0] == chosen[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_replaced_parameters_are_followed_by_name() -> None:
    model = llama()
    optimizer = apollo_dist.APOLLO(model, rank=RANK)
    projection = model.model.layers[0].mlp.up_proj
    old, projection.weight = projection.weight, nn.Parameter(projection.weight.detach().clone())
    stepped(optimizer, model)
    assert not torch.equal(projection.weight, old)

    optimizer = apollo_dist.APOLLO(model, rank=RANK)
    projection.weight = nn.Parameter(torch.ones(3, 16))
    with pytest.raises(ValueError, match=r"up_proj.weight had shape \(24, 16\) .* one of shape \(3, 16\)"):
        stepped(optimizer, model)


def test_a_model_without_the_parameters_is_refused() -> None:
    optimizer = apollo_dist.APOLLO(llama().parameters(), rank=RANK)
    with pytest.raises(ValueError, match="is not one of Linear's, so it has no name"):
        optimizer.attach(nn.Linear(3, 3))
