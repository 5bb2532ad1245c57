"""``"type": "APOLLO"`` in a DeepSpeed config: plain ``deepspeed.initialize``, Accelerate, the Hugging Face ``Trainer``.

The optimizer is built from bare parameters, without ``zero_allow_untested_optimizer``. It must choose the matrices that
``APOLLO(model)`` would choose and draw the projections that belong to their names: a tiny real LLaMA is trained on two
ranks and compared with one process with whole matrices, to 1e-5 relative in fp32. All cases run in one pair of
processes, since importing DeepSpeed and transformers takes longer than training.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import apollo_dist

from .engines import initialize, zero_config
from .llama import GAP, RANK, dense, llama, low_rank_names, tokens
from .models import relative_error
from .ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
STAGES = (0, 1, 2)
STEPS, RATE, TOLERANCE = 6, 1e-2, 1e-5
LINEAR = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]  # the schedule of most cases: two steps up, four down
MINI = {"rank": 1, "scale_type": "tensor", "scale": 4.0}


def optimizer_block(kind: str = "APOLLO", **params: Any) -> dict[str, Any]:
    """What the JSON holds; lists stand for tuples there."""
    return {"type": kind, "params": {"lr": RATE, "betas": [0.9, 0.999], "update_proj_gap": GAP, **params}}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights on every rank, also where ZeRO-3 partitions them."""
    import deepspeed

    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def whole_batches(mine: list[Tensor]) -> list[Tensor]:
    """What all ranks together saw at each step."""
    everyone: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [torch.cat(batch) for batch in zip(*everyone, strict=True)]


def errors(model: nn.Module, expected: dict[str, Tensor]) -> dict[str, float]:
    found = full_weights(model)
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in found}


@contextmanager
def noted() -> Iterator[list[str]]:
    """The lines that apollo_dist logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("apollo_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def step_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """A list that grows by the learning rate of each call of ``step()``."""
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda used, *_: rates.append(used.param_groups[0]["lr"]))
    return rates


# Plain DeepSpeed.


def plain(stage: int, kind: str, adamw: str = "nothing", **params: Any) -> dict[str, float]:
    """``deepspeed.initialize`` with a name and a scheduler in the JSON, and bare parameters."""
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": RATE, "warmup_num_steps": 3, "warmup_type": "linear"}
    config = zero_config(
        stage, optimizer=optimizer_block(kind, **params), scheduler={"type": "WarmupLR", "params": schedule}
    )
    model = llama()
    engine = initialize(model, config, model_parameters=model.parameters())
    assert type(engine.basic_optimizer) is getattr(apollo_dist, kind)
    rates, batches = step_rates(engine.basic_optimizer), []
    for step in range(STEPS):
        batches.append(tokens(step, dist.get_rank()))
        engine.backward(engine(input_ids=batches[-1], labels=batches[-1]).loss)
        engine.step()
    assert len(set(rates)) > 2
    known = {key: params[key] for key in ("scale", "scale_type") if key in params}
    expected = dense(
        whole_batches(batches), rates, rank=params["rank"], adamw=lambda name: adamw in name, **known
    )  # fmt: skip
    return errors(model, expected)


def plain_cases() -> dict[str, dict[str, float]]:
    found = {}
    for stage in STAGES:
        found[f"APOLLO, ZeRO-{stage}"] = plain(stage, "APOLLO", rank=RANK)
        found[f"APOLLOMini, ZeRO-{stage}"] = plain(stage, "APOLLOMini", **MINI)
    found["exclude"] = plain(2, "APOLLO", "self_attn", rank=RANK, exclude="self_attn")
    return found


def log_line(stage: int) -> str:
    """What the log says of the choice, for an optimizer that came without names."""
    model = llama()
    engine = initialize(
        model, zero_config(stage, optimizer=optimizer_block(rank=RANK)), model_parameters=model.parameters()
    )
    with noted() as lines:
        engine.backward(engine(input_ids=tokens(0, 0), labels=tokens(0, 0)).loss)
        engine.step()
    return "\n".join(lines)


# Accelerate and the Trainer.


@contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """Accelerate's state as its launcher makes it for DeepSpeed, but on gloo."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        state = PartialState(backend="gloo")
        assert state.num_processes == dist.get_world_size()
        yield
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        AcceleratorState._reset_state(reset_partial_state=True)


def hugging_face_config(stage: int, **changes: Any) -> dict[str, Any]:
    """``ds_configs/zero*_hf.json`` with a rank that fits the small model; a change to None removes the key."""
    config = json.loads((ROOT / "ds_configs" / f"zero{max(1, stage)}_hf.json").read_text(encoding="utf-8"))
    config["zero_optimization"]["stage"] = stage
    config["optimizer"]["params"].update(rank=RANK, update_proj_gap=GAP)
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


DEEPSPEED_LINEAR = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}  # fmt: skip


def trainer_of(config: dict[str, Any], seen: list[Tensor], **arguments: Any) -> Any:
    """A Trainer of a ``llama``; ``seen`` grows by the token ids of each of this rank's batches."""
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = torch.stack([row["input_ids"] for row in rows])
        seen.append(batch)
        return {"input_ids": batch, "labels": batch}

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(), deepspeed=config, accelerator_config={"use_configured_state": True},
        max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=2,
        weight_decay=0.1, adam_beta2=0.99, adam_epsilon=1e-6, max_grad_norm=0.0, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row} for row in tokens(0, 99, rows=64)]
    arguments.setdefault("model", llama())
    return Trainer(args=settings, train_dataset=data, data_collator=collate, **arguments)


def trainer(config: dict[str, Any], schedule: list[float] = LINEAR, by_code: bool = False) -> dict[str, float]:
    """The real Trainer, with the optimizer from the JSON or as ``optimizer_cls_and_kwargs``."""
    from transformers import TrainerCallback

    rates: list[float] = []

    class Rates(TrainerCallback):
        """Collects the learning rate of every step: under DeepSpeed the optimizer steps inside of backward."""

        def on_train_begin(self, args, state, control, **kwargs):
            nonlocal rates
            rates = step_rates(running.deepspeed.basic_optimizer)

    # The Trainer makes two groups for such an optimizer: norms and biases are not decayed.
    options = {"lr": RATE, "betas": (0.9, 0.99), "rank": RANK, "update_proj_gap": GAP}
    arguments = {"optimizer_cls_and_kwargs": (apollo_dist.APOLLO, options)} if by_code else {}
    seen: list[Tensor] = []
    with deepspeed_on_cpu():
        running = trainer_of(config, seen, callbacks=[Rates()], **arguments)
        running.train()
        assert isinstance(running.deepspeed.basic_optimizer, apollo_dist.APOLLO)
    if by_code:
        assert [g["weight_decay"] for g in running.deepspeed.basic_optimizer.param_groups] == [0.1, 0.0]
        if running.deepspeed.zero_optimization_stage() > 0:
            rates = rates[::2]  # one call for each group
    assert rates == pytest.approx([RATE * part for part in schedule]), rates
    expected = dense(
        whole_batches(seen[:STEPS]),
        rates,
        betas=(0.9, 0.99),
        decay=lambda name: 0.0 if by_code and "norm" in name else 0.1,
    )
    return errors(running.model, expected)


def trainer_cases() -> dict[str, dict[str, float]]:
    found = {}
    for stage in STAGES:
        found[f"ZeRO-{stage}"] = trainer(hugging_face_config(stage))
        by_code = hugging_face_config(stage, optimizer=None)
        found[f"optimizer_cls_and_kwargs, ZeRO-{stage}"] = trainer(by_code, by_code=True)
    found["DeepSpeed's scheduler"] = trainer(
        hugging_face_config(2, scheduler=DEEPSPEED_LINEAR),
        [0.0, *LINEAR[:-1]],  # DeepSpeed's lag by a step
    )
    return found


def accelerator_of(config: dict[str, Any]) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def accelerate(stage: int) -> dict[str, float]:
    """The real Accelerator with ``DummyOptim`` and a torch scheduler made for the optimizer that DeepSpeed builds."""
    from accelerate.utils import DummyOptim, DummyScheduler

    block = optimizer_block(rank=RANK, lr="auto", weight_decay="auto")
    config = hugging_face_config(
        stage, optimizer=block, train_micro_batch_size_per_gpu=2, gradient_clipping=0.0, bf16={"enabled": False}
    )
    model = llama()
    dummy = DummyOptim(model.parameters(), lr=RATE, weight_decay=0.1)
    halves = DummyScheduler(
        dummy, lr_scheduler_callable=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    )
    with deepspeed_on_cpu():
        accelerator = accelerator_of(config)
        engine, optimizer, scheduler = accelerator.prepare(model, dummy, halves)
        rates, batches = step_rates(engine.basic_optimizer), []
        for step in range(STEPS):
            batches.append(tokens(step, dist.get_rank()))
            accelerator.backward(engine(input_ids=batches[-1], labels=batches[-1]).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert rates == pytest.approx([RATE * 0.5**step for step in range(STEPS)])
    return errors(model, dense(whole_batches(batches), rates, decay=lambda name: 0.1))


# Silent replacements.


def swapped() -> str:
    """Accelerate, given an APOLLO and a config with offload."""
    config = json.loads((ROOT / "ds_configs" / "zero2_offload.json").read_text(encoding="utf-8"))
    del config["zero_force_ds_cpu_optimizer"], config["bf16"]
    model = llama()
    with deepspeed_on_cpu():
        try:
            accelerator_of(config).prepare(model, apollo_dist.APOLLO(model, rank=RANK))
        except ValueError as error:
            return str(error)
    return "no error"


def dropped() -> str:
    """The Trainer, given ``optimizers=`` and a DeepSpeed config."""
    model = llama()
    given = apollo_dist.APOLLO(model, rank=RANK)
    with deepspeed_on_cpu():
        running = trainer_of(hugging_face_config(2, optimizer=None), [], model=model, optimizers=(given, None))
        try:
            running.train()
        except ValueError as error:
            return str(error)
    return "no error"


# Names that cannot be known.


def stranger() -> str:
    """A parameter that is not the model's."""
    model = llama()
    parameters = [*model.parameters(), nn.Parameter(torch.ones(5, 7))]
    engine = initialize(model, zero_config(0, optimizer=optimizer_block(rank=RANK)), model_parameters=parameters)
    engine.backward(engine(input_ids=tokens(0, 0), labels=tokens(0, 0)).loss)
    try:
        engine.step()
    except ValueError as error:
        return str(error)
    return "no error"


def around_the_engine(attach: bool) -> str:
    """A step of DeepSpeed's wrapper without its engine, which knows the model."""
    model = llama()
    config = zero_config(2, optimizer=optimizer_block(rank=RANK))
    engine = initialize(model, config, model_parameters=model.parameters())
    if attach:
        engine.basic_optimizer.attach(engine)
    engine.backward(engine(input_ids=tokens(0, 0), labels=tokens(0, 0)).loss)
    with noted() as lines:
        try:
            engine.optimizer.step()
        except ValueError as error:
            return str(error)
    return "\n".join(lines)


def everything(rank: int, world: int) -> dict[str, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {
        "plain": plain_cases(),
        "trainer": trainer_cases(),
        "accelerate": {f"ZeRO-{stage}": accelerate(stage) for stage in STAGES},
        "log": [log_line(stage) for stage in STAGES],
        "swapped": swapped(),
        "dropped": dropped(),
        "stranger": stranger(),
        "around": around_the_engine(attach=False),
        "attached": around_the_engine(attach=True),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


def test_every_case_equals_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        for tool in ("plain", "trainer", "accelerate"):
            for case, found in result[tool].items():
                worst = max(found, key=found.get)  # type: ignore[arg-type]
                assert found[worst] < TOLERANCE, f"{tool}, {case}: {worst} is off by {found[worst]:.1e}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_says_what_was_chosen(results: list[dict[str, Any]], stage: int) -> None:
    line = results[0]["log"][stage]
    assert line.startswith("APOLLO: 14 matrices with 4,352 elements are low-rank (rank 4), 7 tensors"), line
    chosen = line.partition("; chosen: ")[2].split(", ")
    attention = [f"model.layers.*.self_attn.{p}_proj.weight (2)" for p in "qkvo"]
    assert chosen == [*attention, *(f"model.layers.*.mlp.{p}_proj.weight (2)" for p in ("gate", "up", "down"))]
    assert results[1]["log"][stage] == "", "one rank is enough"


def test_silent_replacements_are_refused_on_all_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "APOLLO by DeepSpeedCPUAdam" in result["swapped"], result["swapped"]
        assert '"zero_force_ds_cpu_optimizer": false' in result["swapped"]
        assert "drops optimizers=(APOLLO, ...)" in result["dropped"], result["dropped"]
        assert "optimizer_cls_and_kwargs=(APOLLO, {...})" in result["dropped"]


def test_names_that_cannot_be_known_are_errors(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "1 of 22 parameters, the first of shape (5, 7), are not in the model" in result["stranger"]
        assert "optimizer.attach(engine) before the first step" in result["around"]
    assert "14 matrices with 4,352 elements" in results[0]["attached"], results[0]["attached"]


# Without processes.


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
        state = optimizer.state_dict()["state"]
        shapes.append({name: slot["exp_avg"].shape for name, slot in state.items() if "last_norm" in slot})
    assert shapes[0] == shapes[1]
    assert set(shapes[0]) == {n for n in low_rank_names(model) if "gate" in n or "up" in n}
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


@pytest.mark.parametrize("imports", ["", "import deepspeed"], ids=["before DeepSpeed", "after DeepSpeed"])
def test_registered_in_either_order_of_imports(imports: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDERS.format(imports=imports)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
