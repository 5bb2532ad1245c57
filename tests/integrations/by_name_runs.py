"""Runs for ``test_by_name.py``: plain DeepSpeed builds the optimizer from bare parameters.

Everything here runs on every rank. A run returns each weight's error against one process with whole matrices, or the
message of the error that was expected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import apollo_dist

from ..engines import initialize, zero_config
from ..llama import (
    OFFLOAD,
    RANK,
    RATE,
    STAGES,
    STEPS,
    WithTable,
    dense,
    errors,
    llama,
    offloaded,
    optimizer_block,
    step_rates,
    tokens,
    whole_batches,
)  # fmt: skip
from .hugging_face_runs import accelerate, dropped, hugging_face_config, resumed, swapped, trainer_cases
from .trainer_optim_runs import by_deepspeed

MINI = {"rank": 1, "scale_type": "tensor", "scale": 4.0}


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


# Plain DeepSpeed.


def plain(stage: int, kind: str, adamw: str = "nothing", offload: bool = False, **params: Any) -> dict[str, float]:
    """``deepspeed.initialize`` with a name and a scheduler in the JSON, and bare parameters."""
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": RATE, "warmup_num_steps": 3, "warmup_type": "linear"}
    config = zero_config(
        stage, optimizer=optimizer_block(kind, **params), scheduler={"type": "WarmupLR", "params": schedule}
    )
    model = llama()
    config = offloaded(config) if offload else config
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
    for stage in OFFLOAD:
        found[f"APOLLO, ZeRO-{stage} with offload"] = plain(stage, "APOLLO", offload=True, rank=RANK)
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


def trained(name: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """A model whose names alone would say something else, and a function that gives its loss."""
    if name == "table":
        return WithTable(), lambda engine: engine(torch.arange(5))
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return encoder, lambda engine: engine(torch.ones(1, 3, 8)).square().sum()
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        num_local_experts=4, vocab_size=32,
    )  # fmt: skip
    batch = tokens(0, 0)
    return MixtralForCausalLM(config), lambda engine: engine(input_ids=batch, labels=batch).loss


def choices(stage: int, name: str) -> tuple[list[str], list[str]]:
    """The low-rank matrices of ``APOLLO(model)``, and those of an optimizer that DeepSpeed builds by name."""
    model, loss = trained(name)
    by_model = [name for name, _ in apollo_dist.param_groups(model, rank=2)[0]["params"]]
    engine = initialize(
        model, zero_config(stage, optimizer=optimizer_block(rank=2)), model_parameters=model.parameters()
    )
    engine.backward(loss(engine))
    engine.step()
    low_rank = engine.basic_optimizer._parts.members.choice.low_rank
    state = {key.partition("[")[0] for key, slot in engine.basic_optimizer.named_state().items() if "last_norm" in slot}
    assert state <= {key for key, is_low_rank in low_rank.items() if is_low_rank}
    return by_model, [key for key, is_low_rank in low_rank.items() if is_low_rank]


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
    """What is logged in a step of DeepSpeed's wrapper, without its engine; or the error."""
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
        "resumed": {stage: resumed(stage) for stage in STAGES},
        "accelerate": {f"ZeRO-{stage}": accelerate(stage) for stage in STAGES},
        "named": by_deepspeed(hugging_face_config, offloaded),
        "choices": {name: [choices(stage, name) for stage in STAGES] for name in ("table", "encoder", "mixtral")},
        "log": [log_line(stage) for stage in STAGES],
        "swapped": swapped(),
        "dropped": dropped(),
        "stranger": stranger(),
        "around": around_the_engine(attach=False),
        "attached": around_the_engine(attach=True),
    }
