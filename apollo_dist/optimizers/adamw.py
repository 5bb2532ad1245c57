"""AdamW as a ``torch.optim.Optimizer``; its arithmetic is in ``rules/adamw.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer


class AdamW(ShardedOptimizer):
    """AdamW as ``torch.optim.AdamW`` has it, with the layouts, groups, checkpoints and errors of ``APOLLO``.

    The AdamW that parameters without a low rank take in ``APOLLO`` is Hugging Face's, which differs where epsilon and
    weight decay come in (``apollo_dist.rules.adamw``).

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate, a number or a tensor of one.
        betas, eps: of the moments.
        weight_decay: decoupled; it acts on the weight before the update.
        maximize: follow the negated gradients.
        stochastic_rounding, adam_dtype: as of ``APOLLO``.
        seed, cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group, unknown: as of
            ``APOLLO``; the seed matters where a group names a rule with projections.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.ADAMW

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        adam_dtype: torch.dtype | str | None = None,
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
            params, lr, betas=betas, eps=eps, weight_decay=weight_decay,
            maximize=maximize, stochastic_rounding=stochastic_rounding, adam_dtype=adam_dtype, seed=seed,
            cache_projection=cache_projection, kernels=kernels, skip_nonfinite=skip_nonfinite,
            max_skipped_steps=max_skipped_steps, model=model, process_group=process_group, **unknown,
        )  # fmt: skip
