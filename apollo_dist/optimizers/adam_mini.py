"""Adam-mini as a ``torch.optim.Optimizer``; its arithmetic is in ``rules/adam_mini.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer


class AdamMini(ShardedOptimizer):
    """Adam-mini (arXiv 2406.16793), exact under every layout.

    One second moment for each head of queries and keys, for each row of other matrices (embedding and head: each token)
    and for each norm weight; biases take Adam. What a parameter is, and how many rows a head has, follows from the
    model and its configuration, where it is known; else from names and ``num_heads``.

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate, a number or a tensor of one.
        betas, eps: as in AdamW.
        weight_decay: decoupled; it acts on the weight before the update. Norms and biases have none.
        num_heads: of attention, where the model does not say it.
        num_kv_heads: of keys, where they are grouped and the model does not say it; None where all heads are as large
            as the model's width over ``num_heads``.
        maximize: follow the negated gradients.
        stochastic_rounding, adam_dtype: as of ``APOLLO``.
        seed, cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group, unknown: as of
            ``APOLLO``; the seed matters where a group names a rule with projections.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.ADAM_MINI

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
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
            params, lr, betas=betas, eps=eps, weight_decay=weight_decay, num_heads=num_heads, num_kv_heads=num_kv_heads,
            maximize=maximize, stochastic_rounding=stochastic_rounding, adam_dtype=adam_dtype, seed=seed,
            cache_projection=cache_projection, kernels=kernels, skip_nonfinite=skip_nonfinite,
            max_skipped_steps=max_skipped_steps, model=model, process_group=process_group, **unknown,
        )  # fmt: skip
