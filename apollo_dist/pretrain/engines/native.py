"""What DDP and FSDP share: PyTorch's own backward, clipping and step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apollo_dist.pretrain.optimizers import build_optimizer, schedule

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks


class NativeEngine:
    """Base of the engines that leave the loop to PyTorch; a subclass wraps the model and says when to reduce."""

    updates_in_backward = False

    def __init__(self, config: Config, plan: BatchPlan, wrapped: nn.Module, ranks: Ranks) -> None:
        self.module = self.trained = wrapped
        pure = config.precision == "bf16-pure"
        self.optimizer = build_optimizer(
            config.optimizer, wrapped, config.seed, layerwise=config.layerwise, bf16_weights=pure
        )
        self.schedule = schedule(config)(self.optimizer)
        self._clip = config.gradient_clipping
        self._accumulation = plan.accumulation
        self._autocast = False  # to bf16

    def train(self, mode: bool) -> None:
        """See `Engine`."""
        self.module.train(mode)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """See `Engine`."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._autocast):
            found: Tensor = self.module(input_ids=tokens, targets=targets)
        return found

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def judge(self) -> Tensor | None:
        """See `Engine`."""
        return ~torch.isfinite(self.clipped_norm())

    def update(self, finite: bool) -> bool:
        """See `Engine`."""
        if finite:
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return finite

    def clipped_norm(self) -> Tensor:
        """The norm of all gradients, 0-dim, the same on every rank; they are clipped then, as configured.

        One that is not finite spoils the gradients that it clips, and the step is left out.
        """
        norm = total_norm(self.module)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self._clip, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def total_norm(module: nn.Module) -> Tensor:
    """The norm of all gradients, 0-dim; a DTensor for a sharded model, where each rank has its part."""
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
