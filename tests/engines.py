"""DeepSpeed engines around the test models, on CPU with gloo."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


def zero_config(stage: int, **changes) -> dict:
    """A DeepSpeed config for tests; ``changes`` are top-level keys, ``zero_optimization`` is merged."""
    zero = {
        "stage": stage,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        **changes.pop("zero_optimization", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "wall_clock_breakdown": False,
        **changes,
    }


def prepare():
    """DeepSpeed, ready for CPU tests in an already initialized process group; returns the module.

    Call it before the optimizer is built, so that it can register itself.
    """
    import deepspeed

    # Building the shared-memory extension takes most of a minute and changes nothing that is tested.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # CPUs without AMX multiply fp16 matrices slowly, and DeepSpeed refuses; the test models only add and scale.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    # A process has one engine, or several without hpZ: DeepSpeed would give its groups to the next engine as well.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return deepspeed


def initialize(model: nn.Module, config: dict, **arguments):
    """``deepspeed.initialize`` in an already initialized process group; returns the engine."""
    return prepare().initialize(model=model, config=config, **arguments)[0]


def full_weights(engine, model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights on every rank, in float64: the fp32 master weights where the engine has them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype != torch.float32:
            master = safe_get_full_fp32_param(p)  # None at stage 0, where the wrapper keeps clones to itself
            weights[name] = (p if master is None else master).detach().double()
        elif hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters(p):
                weights[name] = p.detach().double().clone()
        else:
            weights[name] = p.detach().double()
    return weights


@contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """Accelerate's state as its launcher makes it for DeepSpeed, but on gloo."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        state = PartialState(backend="gloo")
        assert state.num_processes == dist.get_world_size()
        yield
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        AcceleratorState._reset_state(reset_partial_state=True)
