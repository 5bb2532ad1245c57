"""A gradient that is not finite on one rank: every rank leaves that step out, and nothing else changes.

Two runs with the same good steps, one of them with bad ones in between, must end in the same bits.
"""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO

from ..engines import full_weights, initialize, zero_config
from ..models import Bag, gradients, groups_of, low_rank, shapes_of
from ..ranks import run_ranks
from ..versions import deepspeed_runs, looks_for_overflow, version

GOOD, BAD_AFTER = 5, (0, 2, 3)  # steps; after how many of them a bad one comes
# The last parameter of rank 1 is in nobody else's shard, the first is one that takes AdamW.
BAD_VALUES = {"embed.linear.weight": math.nan, "layers.6.linear.weight": math.inf, "layers.6.norm": -math.inf}
BF16 = {"bf16": {"enabled": True}}
DEEPSPEED = {
    "zero0": zero_config(0),
    "zero1": zero_config(1),
    "zero2": zero_config(2, gradient_clipping=1.0),
    "zero3": zero_config(3),
    "zero3 sub-groups": zero_config(3, zero_optimization={"sub_group_size": 100}),
    "zero0 bf16": zero_config(0, **BF16),
    "zero2 bf16": zero_config(2, **BF16),
    "bf16 optimizer": zero_config(1, **BF16, data_types={"grad_accum_dtype": "fp32"}),
}


def wanted(shapes: dict[str, torch.Size], step: int, rank: int, bad: str | None) -> dict[str, torch.Tensor]:
    found = gradients(shapes, step, rank, torch.float32)
    if bad is not None and rank == dist.get_world_size() - 1:
        found[bad].view(-1)[-1] = BAD_VALUES[bad]
    return found


def schedule(with_bad: bool) -> list[tuple[int, str | None]]:
    """(seed of the gradients, name of the parameter whose gradient is bad)."""
    names = iter(BAD_VALUES)
    steps: list[tuple[int, str | None]] = []
    for step in range(GOOD):
        steps.append((step, None))
        if with_bad and step in BAD_AFTER:
            steps.append((99, next(names)))
    return steps


def native(engine: str, rank: int, world: int, with_bad: bool) -> tuple[dict[str, torch.Tensor], int]:
    model = Bag()
    shapes, ranks = shapes_of(model), low_rank(model, 3)
    wrapped: nn.Module = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "fsdp2":
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = APOLLO(groups_of(wrapped, ranks), update_proj_gap=2, skip_nonfinite=True)
    for step, bad in schedule(with_bad):
        wrapped(wanted(shapes, step, rank, None if engine == "fsdp2" else bad)).backward()
        if bad is not None and engine == "fsdp2" and rank == world - 1:
            # In the local shard of one rank alone, after the reduction.
            local = model.get_parameter(bad).grad.to_local()
            (local if local.numel() else model.embed.linear.weight.grad.to_local()).view(-1)[-1] = BAD_VALUES[bad]
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: w.detach().clone() for n, w in weights.items()}, optimizer.skipped_steps


def deepspeed(name: str, rank: int, world: int, with_bad: bool) -> tuple[dict[str, torch.Tensor], int]:
    model = Bag(experts=False)
    shapes, ranks = shapes_of(model), low_rank(model, 3)
    optimizer = APOLLO(groups_of(model, ranks), update_proj_gap=2, skip_nonfinite=True)
    engine = initialize(model, DEEPSPEED[name], optimizer=optimizer)
    for step, bad in schedule(with_bad):
        engine.backward(engine(wanted(shapes, step, rank, bad)))
        engine.step()
    weights = {n: w.clone() for n, w in full_weights(engine, model).items()}
    return weights, engine.skipped_steps + optimizer.skipped_steps


def both(rank: int, world: int, kind: str, names: tuple[str, ...]) -> dict[str, tuple[bool, bool, int, int]]:
    torch.backends.mkldnn.set_flags(False)
    run = deepspeed if kind == "deepspeed" else native
    results = {}
    for name in names:
        if kind == "deepspeed" and not looks_for_overflow(DEEPSPEED[name]) and not name.endswith("optimizer"):
            with pytest.raises(ValueError, match="does not look for gradients that are not finite here, and calls"):
                run(name, rank, world, False)
            continue
        (good, none), (bad, skipped) = run(name, rank, world, False), run(name, rank, world, True)
        same = all(torch.equal(good[n], bad[n]) for n in good)
        finite = all(bool(torch.isfinite(w).all()) for w in bad.values())
        results[name] = (same, finite, none, skipped)
    return results


def engines() -> tuple[str, ...]:
    """Those of ``DEEPSPEED`` that the installed version runs.

    Before 0.19.8 (0.16.9 and 0.18.5 were run) BF16_Optimizer, which 0.16.9 takes at stage 0 as well, asserts that the
    norm of gradients is positive, and gives up.
    """
    given_up = ("zero0 bf16", "bf16 optimizer") if version("deepspeed") < (0, 19, 8) else ()
    return tuple(name for name, config in DEEPSPEED.items() if deepspeed_runs(config, 2) and name not in given_up)


@pytest.mark.parametrize(
    ("kind", "world", "names"),
    [
        ("native", 1, ("plain",)),
        ("native", 2, ("ddp", "fsdp2")),
        pytest.param("deepspeed", 2, engines(), marks=pytest.mark.slow),
    ],
)
def test_every_rank_leaves_the_step_out(kind, world, names):
    for results in run_ranks(both, world, kind, names):
        assert set(results) <= set(names)
        assert len(results) == len(names) or version("deepspeed") < (0, 19, 8)
        for name, (same, finite, none, skipped) in results.items():
            assert finite and same, name
            assert (none, skipped) == (0, len(BAD_AFTER)), name


def too_many(rank: int, world: int) -> list[str]:
    model = Bag()
    wrapped = DistributedDataParallel(model)
    shapes = shapes_of(model)
    optimizer = APOLLO(groups_of(wrapped, low_rank(model, 3)), skip_nonfinite=True, max_skipped_steps=2)
    outcomes = []
    for bad in (True, True, False, True, True, True):
        wrapped(wanted(shapes, 0, rank, "layers.6.norm" if bad else None)).backward()
        try:
            optimizer.step()
            outcomes.append(f"{optimizer.skipped_steps}")
        except RuntimeError as error:
            outcomes.append(str(error))
        optimizer.zero_grad()
    return outcomes


def test_too_many_in_a_row_end_the_run_on_every_rank():
    for outcomes in run_ranks(too_many, 2):
        assert outcomes[:5] == ["1", "2", "2", "3", "4"]  # a good step starts the count anew
        assert "3 steps in a row, more than max_skipped_steps=2" in outcomes[5]


def different(rank: int, world: int) -> str:
    model = nn.Linear(8, 8)
    try:
        APOLLO([{"params": [model.weight], "rank": 2}], skip_nonfinite=rank == 0)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_must_agree_on_it():
    for message in run_ranks(different, 2):
        assert "skip_nonfinite" in message


def test_off_by_default():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = APOLLO([{"params": [weight], "rank": 2}])
    weight.grad = torch.full((4, 4), math.nan)
    optimizer.step()
    assert not torch.isfinite(weight).any() and optimizer.skipped_steps == 0


@pytest.mark.parametrize("limit", [-1, 1.5, True, "3"])
def test_bad_limits_are_errors(limit):
    with pytest.raises(ValueError, match="max_skipped_steps"):
        APOLLO([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}], max_skipped_steps=limit)
