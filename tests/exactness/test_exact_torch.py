"""DDP, FSDP2 and HSDP equal one process with whole matrices, in float64 to 1e-9.

The tolerance is rounding: sums over ranks are taken in another order than one process takes them, some 1e-15 a step,
which 25 steps of normalized updates amplify by a few orders of magnitude. A wrong channel shows as 1e-2.
"""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO

from ..judge import judge
from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference

STEPS, GAP, TOLERANCE = 25, 8, 1e-9
CASES = {
    "channel": {"scale_type": "channel", "weight_decay": 0.1},
    "tensor": {"scale_type": "tensor", "scale": 4.0, "rank": 1},
    "no limiter": {"disable_nl": True},
    "tensor, no limiter": {"scale_type": "tensor", "disable_nl": True},
    "signs": {"proj_type": "rademacher"},
}
# As on accelerators; the reference knows nothing of it.
REDRAWN = {"redrawn at every step": {"cache_projection": False}}


def wrap(model: nn.Module, engine: str, world: int) -> nn.Module:
    if engine == "plain":
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def train(engine: str, world: int, rank: int, options: dict) -> dict[str, float]:
    """Errors against the reference after several numbers of steps, the largest over all parameters."""
    model = Bag().double()
    shapes = shapes_of(model)
    options = dict(options)
    ranks, cache = low_rank(model, options.pop("rank", 3)), options.pop("cache_projection", "auto")
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP, seed=5, **options)
    wrapped = wrap(model, engine, world)
    optimizer = APOLLO(groups_of(wrapped, ranks), update_proj_gap=GAP, seed=5, cache_projection=cache, **options)
    errors = {}
    for step in range(STEPS):
        wrapped(gradients(shapes, step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(mean_gradients(shapes, step, world))
        if step in (0, 1, STEPS - 1):
            for name, p in model.named_parameters():
                errors[f"{name} at step {step + 1}"] = relative_error(whole(p), reference.weights[name])
    return errors


def engine_of(case: str) -> str:
    """The engine of a case, which is before the comma, as docs/exactness.md names it."""
    names = {"plain": "one process", "ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2", "hsdp": "HSDP"}
    first, *kind = case.split(",")[0].split()
    if first == "tp":
        return "FSDP2 + tensor parallelism" if "alternating" in kind else "tensor parallelism"
    return " ".join([names[first], *kind]).removesuffix(" full")


def all_cases(rank: int, world: int, engines: tuple[str, ...]) -> dict[str, dict[str, float]]:
    cases = {**CASES, **REDRAWN}
    return {f"{e}, {name}": train(e, world, rank, options) for e in engines for name, options in cases.items()}


@pytest.mark.parametrize(
    ("world", "engines"),
    [
        pytest.param(1, ("plain", "ddp", "fsdp2"), marks=pytest.mark.slow),
        (2, ("ddp", "fsdp2")),
        pytest.param(3, ("ddp", "fsdp2"), marks=pytest.mark.slow),
        pytest.param(4, ("ddp", "fsdp2", "hsdp"), marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(world, engines):
    judge(run_ranks(all_cases, world, engines), TOLERANCE, engine=engine_of)
