"""SGD as a ``torch.optim.Optimizer``; its arithmetic is in ``rules/sgd.py``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer


class SGD(ShardedOptimizer):
    """SGD as ``torch.optim.SGD`` has it, with the layouts, groups, checkpoints and errors of ``APOLLO``.

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate, a number or a tensor of one.
        momentum, dampening: of the running sum of gradients.
        weight_decay: is added to the gradient, times the weight.
        nesterov: look one step ahead.
        maximize: follow the negated gradients.
        stochastic_rounding: as of ``APOLLO``.
        seed, cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group, unknown: as of
            ``APOLLO``; the seed matters where a group names a rule with projections.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        cache_projection: bool | str = "auto",
        kernels: str = "auto",
        skip_nonfinite: bool = False,
        max_skipped_steps: int | None = 10,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            params, lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, stochastic_rounding=stochastic_rounding, seed=seed,
            cache_projection=cache_projection, kernels=kernels, skip_nonfinite=skip_nonfinite,
            max_skipped_steps=max_skipped_steps, model=model, process_group=process_group, **unknown,
        )  # fmt: skip
