"""What cannot be exact ends in an error that says so and what to do, on all ranks, before training, never in AdamW."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial

from apollo_dist import APOLLO
from apollo_dist.sharding import fsdp2
from apollo_dist.sharding.deepspeed.unsupported import unsupported

from ..engines import initialize, prepare, zero_config
from ..ranks import run_ranks
from ..versions import knows


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def wrapped(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **{"use_orig_params": True, **options})


def fsdp1_parameters(world):
    APOLLO(list(wrapped(network()).named_parameters()), rank=2)


def fsdp1_flat(world):
    APOLLO(wrapped(network(), use_orig_params=False), rank=2)


def fsdp1_strided(world):
    model = network()
    model[0].weight = nn.Parameter(torch.ones(8, 8).t())
    model = wrapped(model)
    optimizer = APOLLO(model, rank=2)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()


def fsdp1_gathered(world):
    model = wrapped(network())
    optimizer = APOLLO(model, rank=2)
    model(torch.ones(1, 8)).sum().backward()
    with FullyShardedDataParallel.summon_full_params(model):
        optimizer.step()


def fsdp2_on_cpu(world):
    """As with a torch whose FSDP2 is wrong on CPUs; in float64 none is."""
    with mock.patch.object(fsdp2, "RIGHT_ON_CPU", "99"):
        APOLLO(fully_shard(network().double()), rank=2)
        APOLLO(fully_shard(network()), rank=2)


def partial(world):
    sums = DTensor.from_local(torch.ones(8, 8), init_device_mesh("cpu", (world,)), [Partial()], run_check=False)
    APOLLO([("layers.0.weight", nn.Parameter(sums))], rank=2).step()


def zero3_alone(world):
    """A ZeRO-3 parameter whose step DeepSpeed does not drive."""
    model = network()
    optimizer = APOLLO(model, rank=2)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    initialize(model, zero_config(3, zero_allow_untested_optimizer=True), optimizer=other)
    optimizer.step()


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ZENFLOW = {**OFFLOAD, "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0}}
CPU = {"zero_force_ds_cpu_optimizer": False}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def offload(**options) -> dict:
    return {"offload_optimizer": {"device": "cpu", **options}}


# What the error names -> a configuration that DeepSpeed itself would take, or refuse for another reason.
CONFIGS = {
    "zero_optimization.elastic_checkpoint:": zero_config(2, zero_optimization={"elastic_checkpoint": True}),
    "zero_optimization.zenflow:": zero_config(2, zero_optimization=ZENFLOW, **CPU),
    "zero_optimization.compute_grad_norm:": zero_config(2, zero_optimization={"compute_grad_norm": False}, **AUTOCAST),
    "zero_optimization.offload_optimizer.super_offload:": zero_config(
        3, zero_optimization=offload(super_offload=True), **CPU
    ),
    "zero_optimization.offload_optimizer.ratio:": zero_config(3, zero_optimization=offload(ratio=0.5), **CPU),
    "data_types.grad_accum_dtype:": zero_config(
        2, zero_optimization=OFFLOAD, bf16={"enabled": True}, **FP32_SUMS, **CPU
    ),
    "fp16.fp16_master_weights_and_grads:": zero_config(
        2, zero_optimization=OFFLOAD, fp16={"enabled": True, "fp16_master_weights_and_grads": True}, **CPU
    ),
    "bf16.bf16_master_weights_and_grads:": zero_config(
        2, zero_optimization=OFFLOAD, bf16={"enabled": True, "bf16_master_weights_and_grads": True}, **CPU
    ),
}
# Judged by the JSON alone: DeepSpeed needs a model that it knows before it comes to the optimizer.
JSON_ONLY = {
    "tensor_parallel.autotp_size:": zero_config(1, tensor_parallel={"autotp_size": 2}),
    "expert_parallel.autoep_size:": zero_config(2, expert_parallel={"enabled": True, "autoep_size": 2}),
}
# Neighbours of the refused ones, which work.
ALLOWED = {
    "elastic off": zero_config(2, zero_optimization={"elastic_checkpoint": False}),
    "autocast bf16": zero_config(
        2, zero_optimization={"compute_grad_norm": False}, torch_autocast={"enabled": True, "dtype": "bfloat16"}
    ),
    "no autocast": zero_config(2, zero_optimization={"compute_grad_norm": False}, torch_autocast={"dtype": "float16"}),
    "whole ratio": zero_config(3, zero_optimization=offload(ratio=1.0, super_offload=False)),
    "sums on the device": zero_config(2, bf16={"enabled": True}, **FP32_SUMS),
    "sums at stage 3": zero_config(3, zero_optimization=OFFLOAD, bf16={"enabled": True}, **FP32_SUMS),
    "fp32 offload": zero_config(2, zero_optimization=OFFLOAD, **FP32_SUMS),
    "bf16 states": zero_config(
        2, bf16={"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    ),
    "one slice": zero_config(1, tensor_parallel={"autotp_size": 1}),
    "auto": {"zero_optimization": "auto", "bf16": {"enabled": "auto"}, "data_types": None, "fp16": "auto"},
}


@pytest.mark.parametrize("key", [*CONFIGS, *JSON_ONLY])
def test_the_json_is_refused(key):
    (finding,) = unsupported({**CONFIGS, **JSON_ONLY}[key])
    assert finding.startswith(key)
    assert any(remedy in finding for remedy in ("remove it", "; write ")), "no remedy"


@pytest.mark.parametrize("case", ALLOWED)
def test_the_json_is_not_refused(case):
    assert unsupported(ALLOWED[case]) == []


def by_instance(config):
    model = network()
    initialize(model, config, optimizer=APOLLO(model, rank=2))


def by_name(config):
    model = network()
    section = {"optimizer": {"type": "APOLLO", "params": {"rank": 2}}}
    initialize(model, {**config, **section}, model_parameters=model.parameters())


def experts(world):
    """DeepSpeed's own mixture of experts, one expert on each rank."""
    from deepspeed.moe.layer import MoE

    prepare()
    model = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), num_experts=world, ep_size=world))
    initialize(model, zero_config(0), optimizer=APOLLO([{"params": model.named_parameters()}], rank=2))


class ModelParallel:
    """Megatron's interface: all ranks hold slices of one model."""

    def __init__(self):
        self.slices = dist.group.WORLD
        self.copies = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_model_parallel_group(self):
        return self.slices

    def get_model_parallel_rank(self):
        return dist.get_rank()

    def get_model_parallel_world_size(self):
        return dist.get_world_size()

    def get_data_parallel_group(self):
        return self.copies

    def get_data_parallel_rank(self):
        return 0

    def get_data_parallel_world_size(self):
        return 1


def slices(world):
    prepare()
    model = network()
    initialize(model, zero_config(1), optimizer=APOLLO(model, rank=2), mpu=ModelParallel())


ATTEMPTS = {
    fsdp1_parameters: "0.weight is an FSDP1 parameter, which does not know its shape nor its place",
    fsdp1_flat: "is a flat parameter of FSDP1, in which matrices cannot be told apart; wrap the model with",
    fsdp1_strided: "0.weight is not contiguous, and FSDP1 flattened it in the order of its strides (1, 8)",
    fsdp1_gathered: "the module is gathered. Call step() after the backward pass",
    fsdp2_on_cpu: "over gloo it sums torch.float32 gradients over the ranks instead of averaging them",
    partial: "Redistribute the parameter so that it has no Partial",
    zero3_alone: "is divided by ZeRO-3, but step() was not called by DeepSpeed's engine",
    experts: "are experts of DeepSpeed's MoE",
    # Last, for DeepSpeed keeps what it is given.
    slices: "mpu: each of 2 model-parallel ranks holds a slice",
}


def configs() -> dict:
    """Those configurations that the installed DeepSpeed does not refuse for a key that it does not know."""
    return {key: config for key, config in CONFIGS.items() if knows(config, key.rstrip(":"))}


def messages(rank, world):
    found = {}
    attempts = {attempt.__name__: lambda a=attempt: a(world) for attempt in ATTEMPTS}
    for key, config in configs().items():
        for way in (by_instance, by_name):
            attempts = {f"{way.__name__} {key}": lambda w=way, c=config: w(c), **attempts}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


def test_the_error_says_so_on_all_ranks():
    first, second = run_ranks(messages, 2)
    expected = {attempt.__name__: text for attempt, text in ATTEMPTS.items()}
    expected |= {f"{way.__name__} {key}": key for key in configs() for way in (by_instance, by_name)}
    for name, text in expected.items():
        assert text in first.get(name, "no error"), (name, first.get(name))
    # Each rank raises its own error: under FSDP1 it names a parameter that this rank should hold a part of.
    gathered = [found.pop("fsdp1_gathered") for found in (first, second)]
    assert all("the module is gathered" in text for text in gathered), gathered
    assert first == second
