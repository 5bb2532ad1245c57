"""Runs for ``test_rules_in_tools.py``: every rule's optimizer in DeepSpeed and Accelerate, on a real LLaMA.

A run returns each weight's error against one process with whole matrices, which ``tests/rules/references.py`` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import apollo_dist

from ..engines import initialize, zero_config
from ..llama import RATE, errors, llama, tokens, whole_batches
from ..models import relative_error
from ..rules.problems import CASES, adam_mini_form, low_rank_form, muon_form, scale_form
from ..rules.references import Dense
from .blocks import accelerate_on_cpu, whole_weights
from .hugging_face_fsdp_runs import prepared

STEPS, DECAY, HEAD = 4, 0.1, 8  # rows of a head of the model
LOW_RANK = {"rank": 3, "update_proj_gap": 3, "proj": "random"}

# By class: its options, and what the reference makes of each parameter.
RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "SCALE": ({}, scale_form),
    "AdamMini": ({}, adam_mini_form(HEAD)),
    "GaLore": ({**LOW_RANK, "scale": 0.25}, low_rank_form(alpha=0.25)),
    "Fira": ({**LOW_RANK, "scale": 0.25}, low_rank_form(alpha=0.25, rule="Fira")),
    "Muon": ({"ns_dtype": "state"}, muon_form()),
}


def dense(name: str, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weights of a fresh ``llama`` after one process trained it on whole batches."""
    model = llama()
    weights = dict(model.named_parameters())
    forms = {key: RULES[name][1](key.removeprefix("model."), w.shape) for key, w in weights.items()}
    judge = Dense(weights, forms, lr=RATE, weight_decay=DECAY, draw_dtype=torch.float32)
    for batch in batches:
        grads = torch.autograd.grad(model(input_ids=batch, labels=batch).loss, list(weights.values()))
        judge.step(dict(zip(weights, grads, strict=True)))
        for key, weight in judge.weights.items():
            weights[key].data.copy_(weight)
    return judge.weights


def options(name: str) -> dict[str, Any]:
    return {"lr": RATE, "weight_decay": DECAY, **RULES[name][0]}


def deepspeed(name: str, stage: int) -> dict[str, float]:
    """By its name in the JSON, with bare parameters, where it has one; else as an object."""
    model = llama()
    json = CASES[name].json
    if json is not None:
        config = zero_config(stage, optimizer={"type": json, "params": options(name)})
        engine = initialize(model, config, model_parameters=model.parameters())
    else:
        optimizer = getattr(apollo_dist, name)(model, **options(name))
        engine = initialize(model, zero_config(stage), optimizer=optimizer)
    assert type(engine.basic_optimizer) is getattr(apollo_dist, name)
    batches = []
    for step in range(STEPS):
        batches.append(tokens(step, dist.get_rank()))
        engine.backward(engine(input_ids=batches[-1], labels=batches[-1]).loss)
        engine.step()
    return errors(model, dense(name, whole_batches(batches)))


def accelerate(name: str) -> dict[str, float]:
    """``Accelerator.prepare`` under FSDP2, with the optimizer of the model before it is sharded."""

    def build(model: nn.Module) -> Any:
        return getattr(apollo_dist, name)(model, **options(name))

    batches = []
    with accelerate_on_cpu():
        accelerator, model, optimizer, _ = prepared(build, llama())
        for step in range(STEPS):
            batches.append(tokens(step, dist.get_rank()))
            accelerator.backward(model(input_ids=batches[-1], labels=batches[-1]).loss)
            optimizer.step()
            optimizer.zero_grad()
        found = whole_weights(model)
    expected = dense(name, whole_batches(batches))
    return {key: relative_error(found[key], expected[key]) for key in expected}


def everything(rank: int, world: int) -> dict[str, dict[str, float]]:
    import deepspeed as engine

    engine.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = {f"{name}, DeepSpeed ZeRO-{stage}": deepspeed(name, stage) for name in RULES for stage in (1, 2, 3)}
    return {**found, **{f"{name}, Accelerate FSDP2": accelerate(name) for name in RULES}}
