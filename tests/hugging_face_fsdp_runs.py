"""Runs for ``tests/test_hugging_face_fsdp.py``: the real Trainer and Accelerator with FSDP2, on two gloo ranks.

A run returns each weight's error against one process with whole matrices, or the message of the error that was
expected.
"""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import apollo_dist

from .llama import GAP, RANK, RATE, STEPS, dense, llama, step_rates, tokens, whole_batches
from .models import relative_error

OPTIONS = {"lr": RATE, "rank": RANK, "update_proj_gap": GAP}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 4.0}
LINEAR = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]  # the Trainer's schedule: two steps up, four down

Build = Callable[[nn.Module], apollo_dist.APOLLO]


@contextmanager
def accelerate_on_cpu(fsdp: bool) -> Iterator[None]:
    """Accelerate's state in an initialized gloo group; with ``fsdp`` it takes FSDP, as it does on GPUs alone."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        state = PartialState(cpu=True)
        assert (state.num_processes, state.device.type) == (dist.get_world_size(), "cpu")
        if fsdp:
            # The one thing that is not as on a GPU: on MULTI_CPU Accelerate ignores the plugin and takes DDP.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def errors(model: nn.Module, expected: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        found[name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")] = whole.detach()
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in found}


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
    """Training with ``Accelerator.prepare(model, APOLLO)``, and a scheduler that was made for ours before."""
    with accelerate_on_cpu(fsdp=True):
        accelerator, model, optimizer, ours = prepared(build, llama(), **plugin)
        scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
        rates, batches = step_rates(ours), []
        for step in range(STEPS):
            batches.append(tokens(step, dist.get_rank()))
            accelerator.backward(model(input_ids=batches[-1], labels=batches[-1]).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert len(set(rates)) == STEPS
        expected = dense(whole_batches(batches), rates, adamw=lambda name: adamw in name)
        return errors(model, expected)


def accelerate_cases() -> dict[str, dict[str, float]]:
    def from_groups(model: nn.Module) -> apollo_dist.APOLLO:
        low = [p for name, p in model.named_parameters() if "_proj" in name]
        rest = [p for name, p in model.named_parameters() if "_proj" not in name]
        return apollo_dist.APOLLO([{"params": low, "rank": RANK}, {"params": rest}], lr=RATE, update_proj_gap=GAP)

    def from_parameters(model: nn.Module, **options: Any) -> apollo_dist.APOLLO:
        return apollo_dist.APOLLO(model.parameters(), **OPTIONS, **options)

    return {
        "a model": accelerate(lambda model: apollo_dist.APOLLO(model, **OPTIONS)),
        "names": accelerate(lambda model: apollo_dist.APOLLO(model.named_parameters(), **OPTIONS)),
        "bare parameters": accelerate(from_parameters),
        "exclude": accelerate(lambda model: from_parameters(model, exclude="self_attn"), "self_attn"),
        "groups without names": accelerate(from_groups),
        "activation checkpointing": accelerate(from_parameters, activation_checkpointing=True),
        "loading on one rank": accelerate(from_parameters, cpu_ram_efficient_loading=True),
    }


class WithTable(nn.Module):
    """A block with a table whose name could be a matrix's: only its module, an embedding, says that it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 8), "positions": nn.Embedding(5, 6)})])

    def forward(self, index: Tensor) -> Tensor:
        block = self.layers[0]
        return block["up"](block["positions"](index)).square().sum()


def choices() -> list[str]:
    """The low-rank matrices of an optimizer from bare parameters, where names alone would say more."""
    with accelerate_on_cpu(fsdp=True):
        accelerator, model, optimizer, ours = prepared(
            lambda model: apollo_dist.APOLLO(model.parameters(), rank=2), WithTable(), auto_wrap_policy="no_wrap"
        )
        accelerator.backward(model(torch.arange(5)))
        optimizer.step()
        return [name for name, slot in ours.state_dict()["state"].items() if "last_norm" in slot]


def kept_alive() -> int:
    """How many of the whole parameters are still in memory after ``prepare``."""
    with accelerate_on_cpu(fsdp=True):
        model = llama()
        whole = [weakref.ref(p) for p in model.parameters()]
        _keep = prepared(lambda m: apollo_dist.APOLLO(m, **OPTIONS), model)
        gc.collect()
        return sum(ref() is not None for ref in whole)


def foreign_names() -> str:
    """Names that are not the model's, and parameters that were exchanged: nothing says which is which."""
    with accelerate_on_cpu(fsdp=True):
        try:
            prepared(
                lambda m: apollo_dist.APOLLO([(f"mine.{n}", p) for n, p in m.named_parameters()], **OPTIONS), llama()
            )
        except ValueError as error:
            return str(error)
    return "no error"


# The Trainer.


def trainer(fsdp: bool, kind: str = "APOLLO", **options: Any) -> dict[str, float]:
    """The real Trainer with ``optimizer_cls_and_kwargs``; without ``fsdp`` it takes DDP."""
    from transformers import Trainer, TrainingArguments

    seen: list[Tensor] = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = torch.stack([row["input_ids"] for row in rows])
        seen.append(batch)
        return {"input_ids": batch, "labels": batch}

    given = {**OPTIONS, "betas": (0.9, 0.99), **options}
    with accelerate_on_cpu(fsdp):
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), use_cpu=True, accelerator_config={"use_configured_state": True},
            fsdp=fsdp, fsdp_config={"version": 2} if fsdp else None,
            max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, lr_scheduler_type="linear",
            warmup_steps=2, weight_decay=0.1, max_grad_norm=0.0, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        running = Trainer(
            model=llama(),
            args=arguments,
            train_dataset=[{"input_ids": row} for row in tokens(0, 99, rows=64)],
            data_collator=collate,
            optimizer_cls_and_kwargs=(getattr(apollo_dist, kind), given),
        )
        rates: list[float] = []
        create = running.create_optimizer

        def watched(*args: Any) -> Any:
            made = create(*args)
            made.register_step_pre_hook(lambda used, *_: rates.append(used.param_groups[0]["lr"]))
            return made

        running.create_optimizer = watched
        running.train()
        ours = running.optimizer.optimizer
        assert type(ours) is getattr(apollo_dist, kind)
        assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
        assert rates == pytest.approx([RATE * part for part in LINEAR]), rates
        known = {key: given[key] for key in ("scale", "scale_type") if key in given}
        expected = dense(
            whole_batches(seen[:STEPS]), rates, rank=given["rank"], betas=(0.9, 0.99),
            decay=lambda name: 0.0 if "norm" in name else 0.1, **known,
        )  # fmt: skip
        return errors(running.model, expected)


def trainer_cases() -> dict[str, dict[str, float]]:
    return {
        "FSDP2": trainer(fsdp=True),
        "FSDP2, Mini": trainer(True, "APOLLOMini", **MINI),
        "DDP": trainer(fsdp=False),
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
    batches = []
    try:
        for step in range(STEPS):
            batches.append(tokens(step, dist.get_rank()))
            model(input_ids=batches[-1], labels=batches[-1]).loss.backward()
            ours.step()
            model.zero_grad()
    except ValueError as error:
        return str(error)
    return errors(model, dense(whole_batches(batches), [RATE] * STEPS))


def attached(model: nn.Module) -> str:
    """The error of attaching another model than the one whose parameters are optimized."""
    try:
        apollo_dist.APOLLO(model.parameters(), **OPTIONS).attach(nn.Linear(3, 3))
    except ValueError as error:
        return str(error)
    return "no error"


def everything(rank: int, world: int) -> dict[str, Any]:
    return {
        "accelerate": accelerate_cases(),
        "trainer": trainer_cases(),
        "choices": choices(),
        "alive": kept_alive(),
        "foreign": foreign_names(),
        "sharded after a model": sharded_after(lambda m: apollo_dist.APOLLO(m, **OPTIONS)),
        "sharded after parameters": sharded_after(lambda m: apollo_dist.APOLLO(m.parameters(), **OPTIONS)),
        "sharded after names": sharded_after(lambda m: apollo_dist.APOLLO(m.named_parameters(), **OPTIONS)),
        "attached": attached(llama()),
    }
