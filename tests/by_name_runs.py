"""Runs for ``tests/test_by_name.py``: DeepSpeed, the Trainer and Accelerate build the optimizer, or are to refuse it.

Everything here runs on every rank. A run returns each weight's error against one process with whole matrices, or the
message of the error that was expected.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import apollo_dist

from .engines import deepspeed_on_cpu, initialize, zero_config
from .llama import GAP, RANK, dense, llama, tokens
from .models import relative_error

ROOT = Path(__file__).resolve().parent.parent
STAGES = (0, 1, 2)
STEPS, RATE = 6, 1e-2
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


class WithTable(nn.Module):
    """A block with a table whose name could be a matrix's: only its module, an embedding, says that it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 8), "positions": nn.Embedding(5, 6)})])

    def forward(self, index: Tensor) -> Tensor:
        block = self.layers[0]
        return block["up"](block["positions"](index)).square().sum()


def choices(stage: int) -> tuple[list[str], list[str]]:
    """The low-rank matrices of ``APOLLO(model)``, and those that are chosen by name."""
    model = WithTable()
    by_model = [name for name, _ in apollo_dist.param_groups(model, rank=2)[0]["params"]]
    engine = initialize(
        model, zero_config(stage, optimizer=optimizer_block(rank=2)), model_parameters=model.parameters()
    )
    engine.backward(engine(torch.arange(5)))
    engine.step()
    state = engine.basic_optimizer.state_dict()["state"]
    return by_model, [name for name, slot in state.items() if "last_norm" in slot]


# Accelerate and the Trainer.


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
        "choices": [choices(stage) for stage in STAGES],
        "log": [log_line(stage) for stage in STAGES],
        "swapped": swapped(),
        "dropped": dropped(),
        "stranger": stranger(),
        "around": around_the_engine(attach=False),
        "attached": around_the_engine(attach=True),
    }
