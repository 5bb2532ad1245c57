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


def initialize(model: nn.Module, config: dict, **arguments):
    """``deepspeed.initialize`` in an already initialized process group; returns the engine."""
    import deepspeed

    # Building the shared-memory extension takes most of a minute and changes nothing that is tested.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return deepspeed.initialize(model=model, config=config, **arguments)[0]


def gathered_weights(engine, model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights after a step; every rank holds all of them at stages 0 to 2."""
    return {name: p.detach().double() for name, p in model.named_parameters()}


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
