"""Layouts of later versions end with an error that says so, on all ranks, and never in AdamW."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor

from apollo_dist import APOLLO

from .engines import initialize, zero_config
from .ranks import run_ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def fsdp1(world):
    APOLLO(FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu")), rank=2)


def columns(world):
    mesh = init_device_mesh("cpu", (world,))
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(1)]))
    weight.grad = torch.ones_like(weight)
    APOLLO([("layers.0.weight", weight)], rank=2).step()


def engine_step(world, config):
    model = network()
    engine = initialize(model, config, optimizer=APOLLO(model, rank=2))
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()


def zero3(world):
    engine_step(world, zero_config(3))


def offload(world):
    zero = {"offload_optimizer": {"device": "cpu"}}
    engine_step(world, zero_config(2, zero_optimization=zero, zero_force_ds_cpu_optimizer=False))


EXPECTED = {
    fsdp1: "FSDP1",
    columns: "dim-1 sharding come later",
    zero3: "ZeRO stage 3 (DeepSpeedZeroOptimizer_Stage3) is not supported yet",
    offload: "offload is not supported yet",
}


def messages(rank, world):
    found = {}
    for attempt in EXPECTED:
        try:
            attempt(world)
        except ValueError as error:
            found[attempt.__name__] = str(error)
    return found


def test_the_error_says_so_on_all_ranks():
    first, second = run_ranks(messages, 2)
    assert first == second
    for attempt, text in EXPECTED.items():
        assert text in first.get(attempt.__name__, "no error"), (attempt.__name__, first.get(attempt.__name__))
