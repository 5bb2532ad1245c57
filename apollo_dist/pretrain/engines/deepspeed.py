"""DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from apollo_dist.pretrain.engines.native import total_norm
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.optimizer_config import JsonOptimizer
from apollo_dist.pretrain.optimizers import build_optimizer, schedule
from apollo_dist.pretrain.placing import place_whole

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks
    from apollo_dist.pretrain.engines.deepspeed_json import DeepSpeedJson


class DeepSpeed:
    """Precision, stage and communication are the JSON's; clipping happens inside DeepSpeed."""

    updates_in_backward = False

    def __init__(self, config: Config, json: DeepSpeedJson, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also of a process without a launcher
        import deepspeed  # heavy, and wanted only here

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if ranks.device.type == "cpu":
            # An optional shared-memory collective, which DeepSpeed would otherwise compile for 44 s at first use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(timeout=timedelta(minutes=config.timeout_minutes))  # wraps the group that exists
        _place(config, json, plan, model, ranks)
        own = config.optimizer
        client = None if isinstance(own, JsonOptimizer) else build_optimizer(own, model, config.seed)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters() if client is None else None,
            optimizer=client,
            lr_scheduler=schedule(config),
            config=json.complete(config, plan),
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """See `Engine`."""
        optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        return optimizer

    @property
    def schedule(self) -> LRScheduler:
        """See `Engine`."""
        scheduler: LRScheduler = self._engine.lr_scheduler
        return scheduler

    @property
    def trained(self) -> Any:
        """See `Engine`."""
        return self._engine

    def train(self, mode: bool) -> None:
        """See `Engine`."""
        self._engine.train(mode)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """See `Engine`."""
        found: Tensor = self._engine(input_ids=tokens, targets=targets)
        return found

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See `Engine`. DeepSpeed counts the micro-batches itself, and reduces as the JSON says."""
        yield
        if not last:
            self._engine.step()  # counts: nothing is updated before the last one

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss)  # divides by the number of micro-batches itself

    def judge(self) -> Tensor | None:
        """See `Engine`. DeepSpeed looks at the gradients where it wraps the optimizer: not at stage 0 in fp32."""
        bare = self._engine.optimizer is self._engine.basic_optimizer
        return ~torch.isfinite(total_norm(self._engine.module)) if bare else None

    def update(self, finite: bool) -> bool:
        """See `Engine`. DeepSpeed clips, and waits for the device where it looks at the gradients."""
        engine = self._engine
        if not finite:
            engine.module.zero_grad()  # optimizers leave alone what has no gradient
            engine.step()
            return False
        skipped = engine.skipped_steps
        engine.step()
        made = bool(engine.skipped_steps == skipped)
        if not made and engine.lr_scheduler is not None:
            engine.lr_scheduler.step()  # the schedule goes on under every engine
        return made


def _place(config: Config, json: DeepSpeedJson, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> None:
    """Make the initial weights in the dtype in which DeepSpeed keeps them: partitioned under stage 3, else whole."""
    initial = InitialWeights.of(config, model)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if json.values.get("zero_optimization", {}).get("stage", 0) == 3:
        from apollo_dist.pretrain.engines.zero3 import partition

        partition(model, initial, ranks, dtype, json.complete(config, plan))
    else:
        ranks.together(lambda: place_whole(model, initial, ranks.device, dtype))
