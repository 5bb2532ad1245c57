"""``"type": "APOLLO"`` in a DeepSpeed config: plain ``deepspeed.initialize``, Accelerate, the Hugging Face ``Trainer``.

The optimizer is built from bare parameters, without ``zero_allow_untested_optimizer``. It must choose the matrices that
``APOLLO(model)`` would choose and draw the projections that belong to their names: a tiny real LLaMA is trained on two
ranks and compared with one process with whole matrices, to 1e-5 relative in fp32. All runs (``by_name_runs.py``) share
one pair of processes, since importing DeepSpeed and transformers takes longer than training.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import apollo_dist
from apollo_dist.integrations.deepspeed import name_in_torch

from ..judge import judge
from ..llama import RANK, STAGES, assert_equal_to_one_process, llama, low_rank_names
from ..ranks import run_ranks
from ..timeouts import allowed
from ..versions import TRANSFORMERS, needs_apollo_names
from .by_name_runs import everything

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.slow
def test_every_case_equals_one_process(results: list[dict[str, Any]]) -> None:
    tools = {"plain": "DeepSpeed by name", "trainer": "Trainer, DeepSpeed", "accelerate": "Accelerate, DeepSpeed"}
    for tool, engine in tools.items():
        judge([result[tool] for result in results], TOLERANCE, lambda _, engine=engine: engine, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_trainers_own_checkpoints_resume_exactly(results: list[dict[str, Any]], stage: int) -> None:
    for result in results:
        assert result["resumed"][stage]


@needs_apollo_names
@pytest.mark.slow
def test_optim_apollo_adamw_equals_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        named = result["named"]
        assert_equal_to_one_process(named["cases"])
        assert "DeepSpeed collects, reduces and clips gradients itself" in named["layerwise"], named["layerwise"]
        assert 'outranked by the DeepSpeed config\'s "optimizer", AdamW' in named["another optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_log_says_what_was_chosen(results: list[dict[str, Any]], stage: int) -> None:
    left, line = results[0]["log"][stage].splitlines()
    assert left.startswith("AdamW takes: model.embed_tokens.weight, "), left
    assert "; lm_head.weight, " in left, left
    assert line.startswith("APOLLO: 14 matrices with 4,352 elements are low-rank (rank 4), 7 tensors"), line
    chosen = line.partition("; chosen: ")[2].split(", ")
    attention = [f"model.layers.*.self_attn.{p}_proj.weight (2)" for p in "qkvo"]
    assert chosen == [*attention, *(f"model.layers.*.mlp.{p}_proj.weight (2)" for p in ("gate", "up", "down"))]
    assert results[1]["log"][stage] == "", "one rank is enough"


@pytest.mark.slow
def test_the_choice_is_that_of_the_model(results: list[dict[str, Any]]) -> None:
    attention = ("in_proj_weight", "out_proj.weight")
    linear = ("linear1.weight", "linear2.weight")
    heads, experts = (f"self_attn.{part}_proj.weight" for part in "qkvo"), ("gate_up_proj", "down_proj")
    wanted = {
        "table": ["layers.0.up.weight"],
        "encoder": [
            name for i in range(2) for name in (*(f"layers.{i}.self_attn.{w}" for w in attention),
            *(f"layers.{i}.{w}" for w in linear))
        ],
        "mixtral": [],
    }  # fmt: skip
    if TRANSFORMERS >= (5,):
        stacked = [f"mlp.experts.{one}" for one in experts]
    else:
        stacked = [f"block_sparse_moe.experts.{i}.w{j}.weight" for i in range(4) for j in (1, 2, 3)]
    for part in (*heads, *stacked):
        wanted["mixtral"] += [f"model.layers.{i}.{part}" for i in range(2)]
    for result in results:
        for name, found in result["choices"].items():
            for by_model, by_name in found:
                assert by_model == by_name, name
                assert sorted(by_name) == sorted(wanted[name])


@pytest.mark.slow
def test_silent_replacements_are_refused_on_all_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "APOLLO by DeepSpeedCPUAdam" in result["swapped"], result["swapped"]
        assert '"zero_force_ds_cpu_optimizer": false' in result["swapped"]
        assert "drops optimizers=(APOLLO, ...)" in result["dropped"], result["dropped"]
        assert "optimizer_cls_and_kwargs=(APOLLO, {...})" in result["dropped"]


@pytest.mark.slow
def test_names_that_cannot_be_known_are_errors(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert (
            "1 of 22 parameters, the first of shape (5, 7), are not in the model that is trained" in result["stranger"]
        )


@pytest.mark.slow
def test_a_step_of_the_wrapper_knows_the_engine(results: list[dict[str, Any]]) -> None:
    """``deepspeed.initialize`` tells it; ``attach`` may tell it once more. Only the first rank logs."""
    for how in ("around", "attached"):
        assert "14 matrices with 4,352 elements" in results[0][how], results[0][how]
        assert results[1][how] == "", how


# Without processes.


def test_torchs_own_optimizers_keep_their_names(caplog: pytest.LogCaptureFixture) -> None:
    torchs = torch.optim.SGD
    name_in_torch({"SGD": apollo_dist.SGD, "APOLLO": apollo_dist.APOLLO})
    assert torch.optim.SGD is torchs
    assert torch.optim.APOLLO is apollo_dist.APOLLO
    (said,) = caplog.messages
    assert 'torch has an optimizer SGD of its own, which "type": "SGD" in a DeepSpeed config means' in said


def test_choice_without_names_waits_for_the_engine() -> None:
    model = llama()
    optimizer = apollo_dist.APOLLO(model.parameters(), rank=RANK, exclude="self_attn")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="exclude='self_attn' needs names"):
        optimizer.step()


def test_exclude_acts_on_names_and_is_refused_where_it_cannot() -> None:
    model = llama()
    by_model = apollo_dist.APOLLO(model, rank=RANK, exclude="self_attn|down")
    by_name = apollo_dist.APOLLO(model.named_parameters(), rank=RANK, exclude="self_attn|down")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    shapes = []
    for optimizer in (by_model, by_name):
        optimizer.step()
        state = optimizer.named_state()
        shapes.append({name: slot["exp_avg"].shape for name, slot in state.items() if "last_norm" in slot})
    assert shapes[0] == shapes[1]
    assert set(shapes[0]) == {n for n in low_rank_names(dict(model.named_parameters())) if "gate" in n or "up" in n}
    with pytest.raises(ValueError, match="exclude='x' has no effect on groups with a rank"):
        apollo_dist.APOLLO([{"params": list(model.parameters())[1:2], "rank": 2}], exclude="x")
    with pytest.raises(ValueError, match="not a regular expression"):
        apollo_dist.APOLLO(model, rank=RANK, exclude="(")


def test_auto_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"'auto'; .* Hugging Face Trainer"):
        apollo_dist.APOLLO(llama(), lr="auto", rank=RANK)


ORDERS = """
import sys
import torch
{imports}
import apollo_dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as supported
for cls in (apollo_dist.APOLLO, apollo_dist.APOLLOMini):
    assert supported.count(cls) == 1
    assert getattr(torch.optim, cls.__name__) is cls
import inspect, deepspeed.runtime.zero.utils as utils
assert "ZERO_SUPPORTED_OPTIMIZERS" in inspect.getsource(utils)
assert "exec_module" not in vars(utils.__spec__.loader)
"""


@pytest.mark.parametrize(
    "imports",
    ["", pytest.param("import deepspeed", marks=pytest.mark.slow)],
    ids=["before DeepSpeed", "after DeepSpeed"],
)
def test_registered_in_either_order_of_imports(imports: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDERS.format(imports=imports)],
        capture_output=True,
        text=True,
        timeout=allowed(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
