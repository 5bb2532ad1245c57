"""``--layerwise``: the update happens inside the backward pass, in one process or under FSDP2."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apollo_dist.pretrain.engines.fsdp2 import shard
from apollo_dist.pretrain.engines.native import NativeEngine
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.optimizers import local
from apollo_dist.pretrain.placing import place_whole

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks


class Layerwise(NativeEngine):
    """Under ``--engine fsdp2`` sharded as there; under ``--engine ddp`` the bare model in a single process.

    Gradients are gone before the last one is known, so no step can be left out because of one. A loss that is not
    finite on some rank leaves the step out, before the backward pass; gradients that are not finite under a finite
    loss end the run, since weights are spoilt by then. So the ranks agree, and the host waits, before the backward
    pass as well as after it.
    """

    updates_in_backward = True

    def __init__(self, config: Config, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> None:
        if plan.accumulation > 1:
            raise ValueError(
                f"--layerwise takes a step in each backward pass, and batch_size {plan.batch_size} takes "
                f"{plan.accumulation} with micro_batch_size {plan.micro} on {plan.world} rank(s): pass "
                f"--batch_size {plan.micro * plan.world}, or leave --layerwise out"
            )
        if config.engine == "ddp" and ranks.world > 1:
            raise ValueError(
                f"--layerwise under --engine ddp works in a single process, and there are {ranks.world}: DDP averages "
                "gradients only after they would be used; take --engine fsdp2"
            )
        sharded = config.engine == "fsdp2"
        wrapped = shard(config, model, ranks) if sharded else _whole(config, model, ranks)
        self._ranks = ranks
        self._good: list[Tensor] = []  # of each gradient in this step, whether its norm is finite
        self._left_out = False
        # Before the optimizer's own hooks, which use the gradients up.
        for parameter in wrapped.parameters():
            parameter.register_post_accumulate_grad_hook(self._look)  # type: ignore[no-untyped-call]
        super().__init__(config, plan, wrapped, ranks)
        self._autocast = config.precision == "bf16" and not sharded

    def _look(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._good.append(torch.isfinite(torch.linalg.vector_norm(local(parameter.grad))))

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. Updates the weights, unless the loss of some rank is not finite."""
        (bad,) = self._ranks.sum((~torch.isfinite(loss.detach()))[None])
        self._left_out = bad > 0
        if not self._left_out:
            super().backward(loss)

    def judge(self) -> Tensor | None:
        """See `Engine`."""
        return None

    def update(self, finite: bool) -> bool:
        """See `Engine`. Raises ValueError on every rank if weights were spoilt."""
        made = not self._left_out
        if made:
            self.optimizer.step()
            wrong = ~torch.stack(self._good).all() if self._good else torch.zeros((), dtype=torch.bool)
            self._good.clear()
            (bad,) = self._ranks.sum(wrong[None].to(self._ranks.device))
            if bad:
                raise ValueError(
                    "gradients were not finite though the loss was, and with --layerwise they had been used before "
                    "all were known, so the weights are spoilt: resume from the last checkpoint, with a lower learning "
                    "rate or without --layerwise, which leaves such steps out"
                )
        self.schedule.step()
        return made


def _whole(config: Config, model: nn.Module, ranks: Ranks) -> nn.Module:
    return ranks.together(lambda: place_whole(model, InitialWeights.of(config, model), ranks.device))
