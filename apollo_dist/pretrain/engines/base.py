"""What training needs of an engine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks
    from apollo_dist.pretrain.engines.deepspeed_json import DeepSpeedJson


class Engine(Protocol):
    """A model with its optimizer and learning-rate schedule, spread over the ranks. All methods are collective."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that makes the update, inside whatever the engine wraps it in."""

    @property
    def schedule(self) -> LRScheduler:
        """The learning-rate schedule of the optimizer."""

    @property
    def updates_in_backward(self) -> bool:
        """Whether `backward` changes weights, so that ranks have to agree before it that all have their data."""

    @property
    def trained(self) -> Any:
        """What ``apollo_dist.checkpoint`` takes as the model: DeepSpeed's engine, or the wrapped model."""

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward pass: token ids (b, s) and the ids that follow them (b, s) give losses (b, s) in nats, fp32."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Goes around the forward and the backward pass of a micro-batch; ``last`` of the step's.

        Where the engine can, it communicates gradients in the last one only.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, this rank's mean over one micro-batch.

        The step's gradient is the mean over micro-batches and ranks.
        """

    def judge(self) -> Tensor | None:
        """After the last backward pass: whether a gradient is not finite, 0-dim on the device, with no host sync.

        Gradients are clipped if configured. None where the engine itself looks, in `update`.
        """

    def update(self, finite: bool) -> bool:
        """One optimizer step, one step of the schedule, gradients dropped; clip first where `judge` did not.

        Args:
            finite: what `judge` found, on all ranks together; the same on every rank.

        Where a gradient on any rank is not finite, weights and optimizer stay as they are on all of them. Returns
        whether the optimizer's step was made, the same on every rank.
        """


def build_engine(config: Config, json: DeepSpeedJson | None, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> Engine:
    """The engine of ``config.engine`` (with ``json`` for DeepSpeed) around ``model``."""
    if config.engine == "deepspeed":
        from apollo_dist.pretrain.engines.deepspeed import DeepSpeed

        assert json is not None
        return DeepSpeed(config, json, plan, model, ranks)
    if config.layerwise:
        from apollo_dist.pretrain.engines.layerwise import Layerwise

        return Layerwise(config, plan, model, ranks)
    if config.engine == "fsdp1":
        from apollo_dist.pretrain.engines.fsdp1 import FSDP1

        return FSDP1(config, plan, model, ranks)
    if config.engine == "fsdp2":
        from apollo_dist.pretrain.engines.fsdp2 import FSDP2

        return FSDP2(config, plan, model, ranks)
    from apollo_dist.pretrain.engines.ddp import DDP

    return DDP(config, plan, model, ranks)
