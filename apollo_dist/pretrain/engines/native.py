"""What DDP and FSDP2 share: PyTorch's own backward, clipping and step."""

from __future__ import annotations

from torch import Tensor, nn

from apollo_dist.pretrain.batching import BatchPlan
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.optimizers import build_optimizer, schedule


class NativeEngine:
    """Base of the engines that leave the loop to PyTorch; a subclass wraps the model and says when to reduce."""

    def __init__(self, config: Config, plan: BatchPlan, wrapped: nn.Module, ranks: Ranks) -> None:
        self.module = self.trained = wrapped
        self.optimizer = build_optimizer(config.optimizer, wrapped, config.seed)
        self.schedule = schedule(config)(self.optimizer)
        self._clip = config.gradient_clipping
        self._accumulation = plan.accumulation

    def train(self, mode: bool) -> None:
        """See `Engine`."""
        self.module.train(mode)

    def logits(self, tokens: Tensor) -> Tensor:
        """See `Engine`."""
        output: Tensor = self.module(input_ids=tokens).logits
        return output

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine`."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """See `Engine`."""
        if self._clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
