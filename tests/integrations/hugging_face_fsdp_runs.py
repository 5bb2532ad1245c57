"""Runs for ``test_hugging_face_fsdp.py``: the real Trainer and Accelerator with FSDP2, on two gloo ranks.

A run returns each weight's error against one process with whole matrices, or the message of the error that was
expected.
"""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

import apollo_dist

from ..llama import GAP, RANK, RATE, STEPS, WithTable, llama, tokens
from ..versions import LABELS
from .blocks import (
    accelerate_on_cpu,
    common_folder,
    dataset,
    lose_weights,
    resumes_exactly,
    run_documented,
    watched,
    whole_weights,
    with_fsdp,
)
from .trainer_optim_runs import by_torch

OPTIONS = {"lr": RATE, "rank": RANK, "update_proj_gap": GAP}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 4.0}
LINEAR = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]  # the Trainer's schedule: two steps up, four down

Build = Callable[[nn.Module], apollo_dist.APOLLO]


# Accelerate.


def prepared(build: Build, model: nn.Module, **plugin: Any) -> tuple[Any, nn.Module, Any, apollo_dist.APOLLO]:
    """``Accelerator.prepare(model, APOLLO)`` under FSDP2: accelerator, model, Accelerate's optimizer, and ours."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    settings = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False, **plugin}
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **settings))
    assert accelerator.is_fsdp2
    ours = build(model)
    model, optimizer = accelerator.prepare(model, ours)
    assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    return accelerator, model, optimizer, ours


def accelerate(build: Build, adamw: str = "nothing", **plugin: Any) -> dict[str, float]:
    """Training with ``Accelerator.prepare(model, APOLLO)``, and a scheduler that was made for ours."""
    model = llama()
    with accelerate_on_cpu(), watched(model) as watch:
        accelerator, model, optimizer, ours = prepared(build, model, **plugin)
        scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
        for step in range(STEPS):
            batch = tokens(step, dist.get_rank())
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert len(set(watch.rates)) == STEPS
        return watch.errors(model, adamw=lambda name: adamw in name)


def documented_accelerate(title: str) -> dict[str, float]:
    model = llama()
    loader = DataLoader(dataset(4 * STEPS), batch_size=2)
    with accelerate_on_cpu(), watched(model) as watch:
        found = run_documented(title, model=model, loader=loader)
        return watch.errors(found["model"])


def accelerate_fsdp1(first: bool) -> dict[str, float]:
    """FSDP1, with the optimizer built from the wrapped model (``first``), or before and prepared with it."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    model = llama()
    with accelerate_on_cpu(), watched(model) as watch:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1,
            use_orig_params=True,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        accelerator = Accelerator(fsdp_plugin=plugin)
        if first:
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(apollo_dist.APOLLO(model, **OPTIONS))
        else:
            model, optimizer = accelerator.prepare(model, apollo_dist.APOLLO(model, **OPTIONS))
        assert isinstance(model, FullyShardedDataParallel)
        for step in range(STEPS):
            batch = tokens(step, dist.get_rank())
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        return watch.errors(model)


def accelerate_cases() -> dict[str, dict[str, float]]:
    def from_groups(model: nn.Module) -> apollo_dist.APOLLO:
        low = [p for name, p in model.named_parameters() if "_proj" in name]
        rest = [p for name, p in model.named_parameters() if "_proj" not in name]
        return apollo_dist.APOLLO([{"params": low, "rank": RANK}, {"params": rest}], lr=RATE, update_proj_gap=GAP)

    def from_parameters(model: nn.Module, **options: Any) -> apollo_dist.APOLLO:
        return apollo_dist.APOLLO(model.parameters(), **OPTIONS, **options)

    return {
        "as documented": documented_accelerate("Accelerate"),
        "names": accelerate(lambda model: apollo_dist.APOLLO(model.named_parameters(), **OPTIONS)),
        "groups without names": accelerate(from_groups, activation_checkpointing=True),
        "bare parameters": accelerate(
            lambda model: from_parameters(model, exclude="self_attn"), "self_attn", cpu_ram_efficient_loading=True
        ),
        "FSDP1, model first": accelerate_fsdp1(first=True),
        "FSDP1, both at once": accelerate_fsdp1(first=False),
    }


def choices() -> list[str]:
    """The low-rank matrices of an optimizer from bare parameters, where names alone would say more."""
    with accelerate_on_cpu():
        accelerator, model, optimizer, ours = prepared(
            lambda model: apollo_dist.APOLLO(model.parameters(), rank=2), WithTable(), auto_wrap_policy="no_wrap"
        )
        accelerator.backward(model(torch.arange(5)))
        optimizer.step()
        return [name for name, slot in ours._parts.store.slots.items() if "last_norm" in slot]


def kept_alive() -> int:
    """How many of the whole parameters are still in memory when Accelerate has sharded the model."""
    from accelerate import accelerator

    model = llama()
    # But the last one, which a loop's variable in Accelerate's own ``_prepare_fsdp2`` holds (with torch's AdamW, too).
    whole = [weakref.ref(p) for p in list(model.parameters())[:-1]]
    alive: list[int] = []
    shard = accelerator.fsdp2_prepare_model

    def sharded(*args: Any) -> nn.Module:
        made = shard(*args)
        gc.collect()
        alive.append(sum(ref() is not None for ref in whole))
        return made

    with accelerate_on_cpu(), mock.patch.object(accelerator, "fsdp2_prepare_model", sharded):
        prepared(lambda m: apollo_dist.APOLLO(m, **OPTIONS), model)
    return alive[0]


def foreign_names() -> str:
    """Names that are not the model's, and parameters that were exchanged: nothing says which is which."""
    with accelerate_on_cpu():
        try:
            prepared(
                lambda m: apollo_dist.APOLLO([(f"mine.{n}", p) for n, p in m.named_parameters()], **OPTIONS), llama()
            )
        except ValueError as error:
            return str(error)
    return "no error"


# The Trainer.


def trainer(fsdp: dict[str, Any] | None, kind: str, **options: Any) -> dict[str, float]:
    """The real Trainer with a warm-up; without a config for FSDP it takes DDP."""
    model = llama()
    given = {**OPTIONS, "betas": (0.9, 0.99), **options}
    with accelerate_on_cpu(fsdp), watched(model) as watch:
        running = made(model, fsdp, kind, given, save_strategy="no")
        running.train()
        assert type(watch.optimizer) is getattr(apollo_dist, kind)
        assert watch.rates == pytest.approx([RATE * part for part in LINEAR]), watch.rates
        known = {key: given[key] for key in ("scale", "scale_type") if key in given}
        if fsdp is not None:
            saved_and_loaded(running)
        return watch.errors(running.model, rank=given["rank"], betas=(0.9, 0.99), decay=trainers_decay, **known)


def made(model: nn.Module, fsdp: dict[str, Any] | None, kind: str, given: dict[str, Any], **settings: Any) -> Any:
    """A Trainer."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        **{"output_dir": tempfile.mkdtemp(), **settings, **with_fsdp(fsdp)}, max_steps=STEPS,
        per_device_train_batch_size=2, lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.1,
        max_grad_norm=0.0, report_to=[], logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    optimizer = (getattr(apollo_dist, kind), given)
    made = Trainer(model=model, args=arguments, train_dataset=dataset(), optimizer_cls_and_kwargs=optimizer)
    made.model_accepts_loss_kwargs = False  # transformers 4 divides the sum of losses by how many labels are unshifted
    return made


def saved_and_loaded(running: Any) -> None:
    """Lose a trained Trainer's weights, and take them from a checkpoint again."""
    folder = common_folder()
    ours = running.optimizer.optimizer
    apollo_dist.checkpoint.save(folder, running.model, ours, step=running.state.global_step)
    lose_weights(running.model)
    found = apollo_dist.checkpoint.load(folder, running.model, ours)
    assert found.step == STEPS


def resumed(fsdp: dict[str, Any] | None, kind: str = "APOLLO", **options: Any) -> bool:
    """Whether a Trainer's own checkpoint resumes exactly."""
    return resumes_exactly(
        lambda: accelerate_on_cpu(fsdp),
        lambda **settings: made(llama(), fsdp, kind, {**OPTIONS, **options}, **settings),
        whole_weights,
    )


def trainers_decay(name: str) -> float:
    """What the Trainer's groups make of ``weight_decay=0.1``."""
    return 0.0 if "norm" in name else 0.1


def documented_trainer(title: str) -> dict[str, float]:
    model = llama()
    with accelerate_on_cpu(), watched(model) as watch:
        found = run_documented(title, model=model, dataset=dataset(), folder=tempfile.mkdtemp())
        assert [group["weight_decay"] for group in watch.optimizer.param_groups] == [0.1, 0.0]
        assert len(set(watch.rates)) == STEPS
        return watch.errors(found["trainer"].model, decay=trainers_decay, factor=LABELS)


def trainer_cases() -> dict[str, dict[str, float]]:
    return {
        "as documented": documented_trainer("Trainer"),
        "Mini": trainer({"version": 2}, "APOLLOMini", **MINI),
        "DDP": trainer(None, "APOLLO"),
        # FSDP1 cannot broadcast the weights of modules on the CPU.
        "FSDP1": trainer({"version": 1, "sync_module_states": False}, "APOLLO"),
    }


# Without Hugging Face: parameters that are replaced after the optimizer was built.


def sharded_after(build: Build) -> dict[str, float] | str:
    """``fully_shard`` after the optimizer was built."""
    from torch.distributed.fsdp import fully_shard

    model = llama()
    ours = build(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with watched(model) as watch:
        try:
            for step in range(STEPS):
                batch = tokens(step, dist.get_rank())
                model(input_ids=batch, labels=batch).loss.backward()
                ours.step()
                model.zero_grad()
        except ValueError as error:
            return str(error)
        return watch.errors(model)


def everything(rank: int, world: int) -> dict[str, Any]:
    return {
        "accelerate": accelerate_cases(),
        "trainer": trainer_cases(),
        "resumed": {
            "DDP": resumed(None),
            "whole state": resumed({"version": 2}),
            "sharded state": resumed({"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}),
            "Mini": resumed({"version": 2}, "APOLLOMini", **MINI),
        },
        "named": by_torch(),
        "choices": choices(),
        "alive": kept_alive(),
        "foreign": foreign_names(),
        "sharded after a model": sharded_after(lambda m: apollo_dist.APOLLO(m, **OPTIONS)),
        "sharded after parameters": sharded_after(lambda m: apollo_dist.APOLLO(m.parameters(), **OPTIONS)),
        "sharded after names": sharded_after(lambda m: apollo_dist.APOLLO(m.named_parameters(), **OPTIONS)),
    }
