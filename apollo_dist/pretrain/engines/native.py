"""What DDP and FSDP share: PyTorch's own backward, clipping and step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apollo_dist.pretrain.batching import BatchPlan
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.optimizers import build_optimizer, schedule


class NativeEngine:
    """Base of the engines that leave the loop to PyTorch; a subclass wraps the model and says when to reduce."""

    def __init__(self, config: Config, plan: BatchPlan, wrapped: nn.Module, ranks: Ranks) -> None:
        self.module = self.trained = wrapped
        self.optimizer = build_optimizer(config.optimizer, wrapped, config.seed, layerwise=config.layerwise)
        self.schedule = schedule(config)(self.optimizer)
        self._clip = config.gradient_clipping
        self._accumulation = plan.accumulation
        self._autocast = False  # to bf16

    def train(self, mode: bool) -> None:
        """See `Engine`."""
        self.module.train(mode)

    def logits(self, tokens: Tensor) -> Tensor:
        """See `Engine`."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._autocast):
            output: Tensor = self.module(input_ids=tokens).logits
        return output

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def update(self) -> bool:
        """See `Engine`."""
        finite = math.isfinite(self.clipped_norm())
        if finite:
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return finite

    def clipped_norm(self) -> float:
        """The norm of all gradients, the same on every rank; they are clipped then, as configured."""
        norm = gradient_norm(self.module)
        if self._clip and math.isfinite(norm):
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        return norm


def gradient_norm(module: nn.Module) -> float:
    """The norm of all gradients, those of a sharded model over all ranks; the same on every rank."""
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
