"""SCALE as a ``torch.optim.Optimizer``; its arithmetic is in ``rules/scale.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer
from .signatures import ratio


class SCALE(ShardedOptimizer):
    """SCALE (arXiv 2506.16659), exact under every layout.

    Rows of linear maps and columns of embeddings are divided by their root mean squares; the output head has momentum,
    everything else none. Norms, biases and tables take AdamW. What a parameter is follows from the model, where it is
    known, else from its name; without either every matrix is taken for a linear map, and the log warns.

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate of matrices, a number or a tensor of one.
        momentum: of matrices; None for 0.9 of the output head, and none of others.
        weight_decay: decoupled; it acts on the weight before the update.
        axis: "rows" or "columns", along which the channels of matrices lie; None for columns of embeddings, and rows
            of others.
        eps: the least root mean square to divide by; of AdamW what it is there.
        betas: of AdamW.
        adam_lr: learning rate of AdamW, which follows the schedule of ``lr``; None for the same. Groups keep it as
            ``adam_lr_ratio``, the ratio of both.
        maximize: follow the negated gradients.
        stochastic_rounding, adam_dtype: as of ``APOLLO``.
        seed, cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group, unknown: as of
            ``APOLLO``; the seed matters where a group names a rule with projections.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.SCALE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        *,
        axis: str | None = None,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_lr: float | None = None,
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
        if adam_lr is not None:
            unknown["adam_lr_ratio"] = ratio(adam_lr, lr)
        super().__init__(
            params, lr, momentum=momentum, weight_decay=weight_decay, axis=axis, eps=eps, betas=betas,
            maximize=maximize, stochastic_rounding=stochastic_rounding, adam_dtype=adam_dtype, seed=seed,
            cache_projection=cache_projection, kernels=kernels, skip_nonfinite=skip_nonfinite,
            max_skipped_steps=max_skipped_steps, model=model, process_group=process_group, **unknown,
        )  # fmt: skip
