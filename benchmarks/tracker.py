"""A training step under fake tensors: what torch's memory tracker says that a GPU would hold at the peak.

Every operation of the trainer's model, passes, optimizer and step happens, with shapes and without numbers, and
``torch.distributed._tools.MemTracker`` counts the storages that live. What differs from a GPU:

- The operations of the passes are those of the CPU; on a GPU attention may keep a little more or less.
- The optimizers of this library take the way that they take on CUDA: Triton's kernels over all matrices, which work in
  place and are not launched here, and projections that are generated anew in each step. torch's operations, which a CPU
  takes, would convert weights and gradients of embedding and head to fp32, 8 bytes for each of their elements.
- The reducer of ``DistributedDataParallel`` does not run under fake tensors. What it holds stands in for it: one flat
  buffer of all gradients, of which they are views, and a new gradient that is copied there
  (``gradient_as_bucket_view``). Nothing is communicated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from launches import instead_of_launches
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from apollo_dist.kernels import table
from apollo_dist.kernels.costs import Cost, tell
from apollo_dist.pretrain.batching import BatchPlan
from apollo_dist.pretrain.compute import configure_compute
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.engines.layerwise import Layerwise
from apollo_dist.pretrain.engines.native import NativeEngine
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.model import deferred_model
from apollo_dist.pretrain.placing import place_whole
from apollo_dist.step import batch
from apollo_dist.weights import int8

CATEGORIES = ("Parameter", "Gradient", "Optstate", "Activation", "Temp", "Total")


class PeakTracker(MemTracker):
    """The memory tracker without peaks by module, for which each operation would ask each module of the model."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, held in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < held["Total"]:
                self._peak_mem[device] = held["Total"]
                self._peak_mem_snap[device] = dict(held)


class Alone(Ranks):
    """One process without a process group, whose tensors may have no values."""

    def sum(self, values: torch.Tensor) -> list[float]:
        """Zeros: losses and gradients are taken as finite."""
        return [0.0] * values.numel()

    def together(self, work: Callable[[], Any]) -> Any:
        """The result of ``work()``."""
        return work()


def engine_of(config: Config, device: torch.device) -> tuple[NativeEngine, list[torch.Tensor]]:
    """The trainer's engine in one process, and what stands in for DDP's buckets; none with updates inside backward."""
    model = deferred_model(config.model, config.sequence_length, config.attention)
    configure_compute(model, config)
    if config.layerwise:
        return Layerwise(config, BatchPlan(1, 1, 1, 1), model, Alone(0, 1, device)), []
    place_whole(model, InitialWeights.of(config, model), device)
    dtype = next(model.parameters()).dtype
    buckets = torch.empty(sum(p.numel() for p in model.parameters()), dtype=dtype, device=device)
    first = 0
    for parameter in model.parameters():
        view = buckets[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
        parameter.register_post_accumulate_grad_hook(lambda p, view=view: _into_bucket(p, view))
    return NativeEngine(config, BatchPlan(1, 1, 1, 1), model, Ranks(0, 1, device)), [buckets]


def _into_bucket(parameter: nn.Parameter, view: torch.Tensor) -> None:
    assert parameter.grad is not None
    view.copy_(parameter.grad)
    parameter.grad = view


def step(engine: NativeEngine, config: Config, micro: int, device: torch.device) -> torch.Tensor:
    """One optimizer step of one micro-batch, as the trainer takes it; its loss."""
    tokens = torch.zeros(micro, config.sequence_length + 1, dtype=torch.int64, device=device)
    loss = engine.losses(tokens[:, :-1], tokens[:, 1:]).mean()
    engine.backward(loss)
    engine.judge()
    engine.update(finite=True)
    return loss.detach()


def tracked(config: Config, micro: int, *, foreach: bool = False) -> dict[str, int]:
    """Two steps under fake tensors: bytes at the peak by the memory tracker's categories.

    Args:
        config: of the run.
        micro: sequences of the micro-batch.
        foreach: torch's optimizers work on all tensors at once, as they do on CUDA by default, and not one by one.
    """
    device = torch.device("cpu")
    with _unfilled(), _as_on_cuda(), _fake_mode():
        engine, buckets = engine_of(config, device)
        if hasattr(engine.optimizer, "cache_projection"):
            engine.optimizer.cache_projection = False
        for group in engine.optimizer.param_groups:
            group.update({"foreach": foreach} if "foreach" in group else {})
        tracker = PeakTracker()
        tracker.track_external(engine.module, engine.optimizer, *buckets)
        with tracker:
            step(engine, config, micro, device)
            tracker.reset_mod_stats()
            step(engine, config, micro, device)
        peak = tracker.get_tracker_snapshot("peak")[device]
    found = {str(getattr(key, "value", key)): int(value) for key, value in peak.items()}
    return {category: found.get(category, 0) for category in CATEGORIES}


@contextlib.contextmanager
def _unfilled() -> Iterator[None]:
    """Leave initial weights as they are: fake ones have no values."""
    with patch.object(InitialWeights, "fill", lambda *_, **__: None):
        yield


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Let steps on fake CPU tensors take the way of CUDA devices."""

    def told(kernel: Any, grid: Any, device: torch.device, cost: Callable[[], Cost], *_: Any, **__: Any) -> None:
        tell(cost())

    with contextlib.ExitStack() as stack:
        stack.enter_context(instead_of_launches(told))
        stack.enter_context(patch.object(table, "torch_kernels", table._triton))
        for module, limits in ((batch, "_ELEMENTS"), (batch, "_NUMBERS"), (int8, "_ELEMENTS")):  # those of CPUs
            stack.enter_context(patch.object(module, limits, {}))
        yield


@lru_cache
def _fake_mode() -> FakeTensorMode:
    """One mode for all: tables that the kernels keep are of the mode that they were made in."""
    return FakeTensorMode(allow_non_fake_inputs=True)
