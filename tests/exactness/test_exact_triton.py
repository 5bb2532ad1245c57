"""Steps of Triton's kernels equal one process with whole matrices under every engine, in fp32 to 1e-5 relative.

Where no GPU is, the kernels run in Triton's interpreter, so that there are few steps. The tolerance is that of ZeRO's
flat fp32 partitions: rounding in gradients, norms and updates, 1e-7 each. A wrong element shows as 1e-2 or more.
"""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO
from apollo_dist.exchange import buckets

from ..engines import zero_config
from ..judge import judge
from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from ..sharded import fsdp1, fsdp2, tp, whole
from ..versions import deepspeed_runs
from . import test_exact_torch, zero_runs

pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")

STEPS, GAP, TOLERANCE = 4, 2, 1e-5
# Tall, wide, one row, one that flat cuts cross, and two whose columns two ranks divide evenly.
SHAPES = [(24, 7), (6, 25), (1, 11), (5, 31), (16, 4), (6, 24)]


def hsdp(model: nn.Module, kind: str, world: int) -> nn.Module:
    """Two replicas, each of half of the ranks."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {
    "plain": lambda model, kind, world: model,
    "ddp": lambda model, kind, world: DistributedDataParallel(model),
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
}
CHANNEL = {"weight_decay": 0.1}
TENSOR = {"scale_type": "tensor", "scale": 4.0, "rank": 1}
SIGNS = {"proj_type": "rademacher", "disable_nl": True}
CASES = [
    ("ddp", "", CHANNEL),
    ("fsdp1", "full", CHANNEL),
    ("fsdp2", "", TENSOR),
    ("fsdp2", "dim 1", SIGNS),
    ("tp", "rows", CHANNEL),
]
# In buckets of some numbers, so that there are several.
BUCKET = 50
ZERO = {
    "zero0": (zero_config(0), {"weight_decay": 0.1}),
    "zero1": (zero_config(1), {"scale_type": "tensor", "scale": 4.0}),
    "zero2": (zero_config(2), {"weight_decay": 0.1}),
    "zero3": (zero_config(3), {}),
    "zero3 bf16": (zero_config(3, **zero_runs.BF16), {"weight_decay": 0.1}),
}


def kinds_of(optimizer: APOLLO) -> set[str]:
    """The kinds of kernels that an optimizer's steps take, for matrices and other parameters."""
    plans = optimizer._parts.plans.built.values()
    found = {m.kernels.name for plan in plans for group in plan.shard_groups for m in group.matrices}
    return found | {t.kernels.name for plan in plans for t in plan.elementwise}


def train(engine: str, kind: str, world: int, rank: int, options: dict) -> dict[str, float]:
    """Errors against the reference after the first and the last step, of all parameters."""
    model: nn.Module = Bag(shapes=SHAPES[:2] if engine == "hsdp" else SHAPES)
    shapes = shapes_of(model)
    options = dict(options)
    ranks = low_rank(model, options.pop("rank", 3))
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP, seed=5, **options)
    wrapped = WRAPS[engine](model, kind, world)
    given = {"update_proj_gap": GAP, "seed": 5, "cache_projection": engine != "ddp"}
    optimizer = APOLLO(groups_of(wrapped, ranks), model=wrapped, kernels="triton", **given, **options)
    data, copies = (rank // 2, world // 2) if engine == "tp" else (rank, world)
    errors = {}
    for step in range(STEPS):
        wrapped(gradients(shapes, step, data, torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(mean_gradients(shapes, step, copies, torch.float32))
        if step in (0, STEPS - 1):
            for name, p in whole(wrapped).items():
                errors[f"{name} at step {step + 1}"] = relative_error(p, reference.weights[name])
    assert kinds_of(optimizer) == {"triton"}
    assert len(errors) == 2 * len(shapes)
    return errors


def in_buckets(rank: int, world: int) -> dict[str, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "NUMBERS", BUCKET)
        patch.setattr(buckets, "CHANNELS", 1)
        return torchs_engines(rank, world, [("fsdp2", "", CHANNEL)])


def torchs_engines(rank: int, world: int, cases: list) -> dict[str, dict[str, float]]:
    return {
        f"{engine} {kind}, triton {number}": train(engine, kind, world, rank, options)
        for number, (engine, kind, options) in enumerate(cases)
    }


def deepspeeds_stages(rank: int, world: int) -> dict[str, dict[str, float]]:
    return {
        f"{name} triton": zero_runs.train(rank, world, config, options, steps=STEPS, gap=GAP, kernels="triton")
        for name, (config, options) in ZERO.items()
        if deepspeed_runs(config, world)
    }


@pytest.mark.slow
def test_torchs_engines_equal_the_reference():
    judge(run_ranks(torchs_engines, 2, CASES), TOLERANCE, test_exact_torch.engine_of, "float32")


@pytest.mark.slow
def test_hsdp_equals_the_reference():
    judge(run_ranks(torchs_engines, 4, [("hsdp", "", CHANNEL)]), TOLERANCE, test_exact_torch.engine_of, "float32")


def test_an_exchange_in_buckets_equals_the_reference():
    judge(run_ranks(in_buckets, 2), TOLERANCE, test_exact_torch.engine_of, "float32")


@pytest.mark.slow
def test_deepspeeds_stages_equal_the_reference():
    judge(run_ranks(deepspeeds_stages, 2), TOLERANCE, zero_runs.engine_of, "float32")


@pytest.mark.parametrize("options", [CHANNEL, TENSOR, SIGNS])
def test_one_process_equals_the_reference(options):
    judge([{"plain": train("plain", "", 1, 0, options)}], TOLERANCE, test_exact_torch.engine_of, "float32")
