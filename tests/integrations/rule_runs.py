"""Runs for ``test_rules_in_tools.py``: every rule's optimizer in DeepSpeed and other tools, on a real LLaMA.

A run returns each weight's error against one process with whole matrices, which ``tests/rules/references.py`` is.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

import apollo_dist

from ..engines import initialize, zero_config
from ..llama import RATE, errors, llama, tokens, trained, whole_batches
from ..models import relative_error
from ..rules.problems import CASES, adam_mini_form, low_rank_form, muon_form, scale_form
from ..rules.references import Dense
from .blocks import accelerate_on_cpu, dataset, documented, watched, whole_weights
from .hugging_face_fsdp_runs import made, prepared, trainers_decay

STEPS, DECAY, HEAD = 4, 0.1, 8  # rows of a head of the model
LOW_RANK = {"rank": 3, "update_proj_gap": 3, "proj": "random"}

# By class: its options, and what the reference makes of each parameter.
RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "SCALE": ({}, scale_form),
    "AdamMini": ({}, adam_mini_form(HEAD)),
    "GaLore": ({**LOW_RANK, "scale": 0.25}, low_rank_form(alpha=0.25)),
    "Fira": ({**LOW_RANK, "scale": 0.25}, low_rank_form(alpha=0.25, rule="Fira")),
    "Muon": ({"ns_dtype": "state"}, muon_form()),
    "SGD": ({"momentum": 0.9}, lambda name, shape: ("sgd", {"momentum": 0.9})),
}


def dense(
    name: str,
    batches: Sequence[Tensor],
    rates: Sequence[float] | None = None,
    decay: Callable[[str], float] = lambda key: DECAY,
    prefix: str = "",
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """The weights of a fresh ``llama`` after one process trained it on whole batches.

    Args:
        name: of the rule.
        batches: for each step the token ids of all ranks.
        rates: for each step the learning rate.
        decay: a parameter's weight decay.
        prefix: in front of the model's names, where it is a part of another module.
        factor: what the gradients of the mean loss are multiplied by.
    """
    model = llama()
    weights = dict(model.named_parameters(prefix=prefix))
    inner = {key: key.removeprefix(f"{prefix}.").removeprefix("model.") for key in weights}
    parts = []
    for value in sorted({decay(key) for key in weights}):
        mine = {key: w for key, w in weights.items() if decay(key) == value}
        forms = {key: RULES[name][1](inner[key], w.shape) for key, w in mine.items()}
        parts.append(Dense(mine, forms, lr=RATE, weight_decay=value, draw_dtype=torch.float32))
    return trained(model, weights, parts, batches, rates or [RATE] * len(batches), factor)


def options(name: str) -> dict[str, Any]:
    return {"lr": RATE, "weight_decay": DECAY, **RULES[name][0]}


def deepspeed(name: str, stage: int) -> dict[str, float]:
    """By its name in the JSON, with bare parameters."""
    model = llama()
    config = zero_config(stage, optimizer={"type": CASES[name].json, "params": options(name)})
    engine = initialize(model, config, model_parameters=model.parameters())
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


def watched_errors(name: str, watch: Any, model: nn.Module, **how: Any) -> dict[str, float]:
    """Each weight's error after a tool's own loop; ``how`` as of ``dense``."""
    assert type(watch.optimizer) is getattr(apollo_dist, name) and len(watch.rates) == 6, watch.rates
    found = whole_weights(model)
    expected = dense(name, whole_batches(watch.batches[: len(watch.rates)]), watch.rates, **how)
    return {key: relative_error(found[key], expected[key]) for key in expected}


def trainer(name: str) -> dict[str, float]:
    """Hugging Face's Trainer under FSDP2, with ``optimizer_cls_and_kwargs`` and a schedule."""
    fsdp, model = {"version": 2}, llama()
    with accelerate_on_cpu(fsdp), watched(model) as watch:
        running = made(model, fsdp, name, options(name), save_strategy="no")
        running.train()
        return watched_errors(name, watch, running.model, decay=trainers_decay)


def lightning(name: str) -> dict[str, float]:
    """The page's block for Lightning and FSDP2, with another optimizer in APOLLO's place."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    code, count = re.subn(r"APOLLO\(self\.trainer\.model, [^)]*\)", f"{name}(self.trainer.model, **options)",
                          documented("Lightning, FSDP2").replace("import APOLLO", f"import {name}"))  # fmt: skip
    assert count == 1
    model = llama()
    names = {"__name__": "documented", "model": model, "options": options(name)}
    names["loader"] = DataLoader(dataset(), batch_size=2)
    with chdir(tempfile.mkdtemp()), watched(model) as watch:
        exec(compile(code, f"Lightning, {name}", "exec"), names)
    return watched_errors(name, watch, names["trainer"].model, prefix="model")


def everything_in_lightning(rank: int, world: int) -> dict[str, dict[str, float]]:
    return {f"{name}, Lightning FSDP2": lightning(name) for name in RULES}


def everything(rank: int, world: int) -> dict[str, dict[str, float]]:
    import deepspeed as engine

    engine.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = {f"{name}, DeepSpeed ZeRO-{stage}": deepspeed(name, stage) for name in RULES for stage in (1, 2, 3)}
    found |= {f"{name}, Accelerate FSDP2": accelerate(name) for name in RULES}
    return {**found, **{f"{name}, Trainer FSDP2": trainer(name) for name in RULES}}
