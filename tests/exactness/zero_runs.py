"""One training run under DeepSpeed beside the reference; used by the tests of all stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apollo_dist import APOLLO

from ..engines import full_weights, initialize, prepare
from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..reference import Reference

# One block of a DeepSpeed config each, for ``zero_config``.
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_BOTH = {**OFFLOAD, "offload_param": {"device": "cpu"}}
# Gradients are added and averaged in fp32, or the reference would have to round as the engine does. (Stage 2 divides by
# the number of ranks before that, which rounds unless it is a power of two.)
FP32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
BF16 = {"bf16": {"enabled": True}, **FP32_SUMS}
FP16_SUMS = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1000, "hysteresis": 1}}
FP16 = {**FP16_SUMS, **FP32_SUMS}


def clipped(grads: dict[str, torch.Tensor], limit: float) -> dict[str, torch.Tensor]:
    """Clipping by the global norm, as DeepSpeed does it."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    return {name: g * min(1.0, limit / (float(norm) + 1e-6)) for name, g in grads.items()}


def train(
    rank: int,
    world: int,
    config: dict,
    options: dict,
    *,
    steps: int,
    accumulation: int = 1,
    clipping: float | None = None,
    alike: bool = False,
    poison: dict[int, tuple[int, float]] | None = None,
    **building,
) -> dict[str, float]:
    """Errors of all weights against the reference after the last step.

    Args:
        rank, world: of this process.
        config: DeepSpeed's.
        options: of both optimizers.
        steps: how many steps.
        accumulation: micro-batches of a step; the config says the same.
        clipping: the norm that the config clips to.
        alike: all ranks give the same gradients, so that no average of two or four has to round.
        poison: step -> (rank, value) of a gradient that is not finite: all ranks must leave everything as it is.
        building: what ``Run.build`` takes.
    """
    run = Run.build(config, options, **building)
    engine, optimizer, shapes = run.engine, run.optimizer, run.shapes
    for step in range(steps):
        micro = [accumulation * step + i for i in range(accumulation)]
        bad = (poison or {}).get(step)
        before = optimizer.state_dict()["state"] if bad else None
        for i in micro:
            given = gradients(shapes, i, 0 if alike else rank, run.dtype)
            if bad and bad[0] == rank:
                given["layers.2.linear.weight"][1, 2] = bad[1]
            engine.backward(engine(given))
            rates = [group["lr"] for group in optimizer.param_groups]
            engine.step()
        if bad:
            assert engine.optimizer.overflow, f"step {step} was not skipped on rank {rank}"
            assert_equal(before, optimizer.state_dict()["state"])
            continue
        means = [mean_gradients(shapes, i, 1 if alike else world, run.dtype) for i in micro]
        grads = {name: sum(m[name] for m in means) / accumulation for name in shapes}
        if clipping is not None:
            grads = clipped(grads, clipping)
        for rate, held in zip(rates, run.members, strict=False):
            run.reference.lr = rate
            run.reference.step({name: grads[name] for name in held})
    assert engine.skipped_steps == len(poison or {})
    weights = full_weights(engine, run.model)
    return {name: relative_error(weights[name], run.reference.weights[name]) for name in shapes}


@dataclass
class Run:
    """A model under DeepSpeed, and the reference of it."""

    model: nn.Module
    engine: Any
    optimizer: APOLLO
    reference: Reference
    members: list[list[str]]  # names that share a learning rate
    shapes: dict[str, torch.Size]
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        config: dict,
        options: dict,
        *,
        gap: int,
        init: bool = False,
        frozen: str = "nothing",
        by_name: bool = False,
        schedule: bool = False,
        kernels: str = "auto",
    ) -> Run:
        """Both from the same weights.

        Args:
            config: DeepSpeed's.
            options: of both optimizers.
            gap: steps between redraws.
            init: build the model under ``deepspeed.zero.Init``.
            frozen: names that start so are not trained.
            by_name: matrices are chosen by name.
            schedule: every parameter group has a learning rate of its own, and a scheduler changes it.
            kernels: what steps compute with.
        """
        deepspeed = prepare()
        dtype = torch.float16 if "fp16" in config else torch.bfloat16 if "bf16" in config else torch.float32
        model = Bag().to(dtype)
        ranks = {n: 1 if by_name else r for n, r in low_rank(model, 3).items() if not n.startswith(frozen)}
        start = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(frozen)}
        if init:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = Bag()
        for name, p in model.named_parameters():
            p.requires_grad_(name in start)
        groups = groups_of(model, ranks)
        if schedule:
            groups = [{**group, "lr": 0.02 / (i + 1)} for i, group in enumerate(groups)]
        chosen = {"params": model, "rank": 1} if by_name else {"params": groups}
        optimizer = APOLLO(**chosen, update_proj_gap=gap, kernels=kernels, **options)
        arguments = {"lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)} if schedule else {}
        engine = initialize(model, config, optimizer=optimizer, **arguments)
        if init and dtype != torch.float32:
            start = full_weights(engine, model)  # zero.Init draws them anew, in low precision
        reference = Reference(start, ranks, update_proj_gap=gap, draw_dtype=torch.float32, **options)
        shapes = shapes_of(model)
        members = [[name for name, _ in group["params"]] for group in groups] if schedule else [list(shapes)]
        return cls(model, engine, optimizer, reference, members, shapes, dtype)


def assert_equal(first: dict[str, dict], second: dict[str, dict]) -> None:
    """The same state, bit for bit."""
    assert first.keys() == second.keys()
    for name, slot in first.items():
        for key, value in slot.items():
            same = torch.equal(value, second[name][key]) if isinstance(value, torch.Tensor) else True
            assert same and str(value) == str(second[name][key]), f"{key} of {name} changed"


def engine_of(case: str) -> str:
    """The engine of a case, as docs/exactness.md names it; cases without a stage in their name are of stage 3."""
    words = case.split()
    if case == "BF16_Optimizer":
        return "ZeRO-1, bf16"
    stage = words[0][-1] if words[0].startswith("zero") else "3"
    marks = [word for word in ("bf16", "fp16", "hpZ", "offload") if word in words]
    return ", ".join([f"ZeRO-{stage}", *marks])
