"""Runs for ``test_by_name.py`` with the real Trainer and the real Accelerator, on two gloo ranks.

They read ``ds_configs/zero*_hf.json``. A run returns each weight's error against one process with whole matrices, or
the message of the error that was expected.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import apollo_dist

from ..engines import deepspeed_on_cpu
from ..llama import (
    GAP,
    OFFLOAD,
    RANK,
    RATE,
    STAGES,
    STEPS,
    dense,
    errors,
    full_weights,
    llama,
    offloaded,
    optimizer_block,
    step_rates,
    tokens,
    whole_batches,
)  # fmt: skip
from .blocks import resumes_exactly

ROOT = Path(__file__).resolve().parents[2]
LINEAR = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]  # the schedule of most cases: two steps up, four down


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


def trainer_of(
    config: dict[str, Any], seen: list[Tensor], changes: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """A Trainer of a ``llama``; ``seen`` grows by the token ids of each of this rank's batches.

    ``changes`` are other training arguments, the rest is the Trainer's own.
    """
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = torch.stack([row["input_ids"] for row in rows])
        seen.append(batch)
        return {"input_ids": batch, "labels": batch}

    kept = {"output_dir": tempfile.mkdtemp(), "save_strategy": "no", **(changes or {})}
    settings = TrainingArguments(
        **kept, deepspeed=config, accelerator_config={"use_configured_state": True},
        max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=2,
        weight_decay=0.1, adam_beta2=0.99, adam_epsilon=1e-6, max_grad_norm=0.0, report_to=[], logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row} for row in tokens(0, 99, rows=64)]
    arguments.setdefault("model", llama())
    made = Trainer(args=settings, train_dataset=data, data_collator=collate, **arguments)
    made.model_accepts_loss_kwargs = False  # transformers 4 divides the sum of losses by how many labels are unshifted
    return made


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


def resumed(stage: int) -> bool:
    """Whether a Trainer's own checkpoint, which DeepSpeed writes, resumes exactly."""
    return resumes_exactly(
        deepspeed_on_cpu, lambda **settings: trainer_of(hugging_face_config(stage), [], settings), full_weights
    )


def trainer_cases() -> dict[str, dict[str, float]]:
    found = {}
    for stage in STAGES:
        found[f"ZeRO-{stage}"] = trainer(hugging_face_config(stage))
        by_code = hugging_face_config(stage, optimizer=None)
        found[f"optimizer_cls_and_kwargs, ZeRO-{stage}"] = trainer(by_code, by_code=True)
    for stage in OFFLOAD:
        found[f"ZeRO-{stage} with offload"] = trainer(offloaded(hugging_face_config(stage)))
        by_code = hugging_face_config(stage, optimizer=None, zero_force_ds_cpu_optimizer=False)
        found[f"optimizer_cls_and_kwargs, ZeRO-{stage} with offload"] = trainer(offloaded(by_code), by_code=True)
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
