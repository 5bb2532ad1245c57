"""Muon as a ``torch.optim.Optimizer``; its arithmetic is in ``rules/muon.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer
from .signatures import ratio


class Muon(ShardedOptimizer):
    """Muon, exact under every layout: orthogonalized momentum for hidden matrices, AdamW for all else.

    Names and equations are those of ``torch.optim.Muon``. One rank gets the momentum of a whole matrix, takes the
    Newton-Schulz iterations, and sends each rank its elements. Stacks of experts go matrix by matrix. Embedding, output
    head, norms, biases and tables take AdamW; what a parameter is follows from the model, where it is known, else from
    its name; without either every matrix is taken for a hidden one, and the log warns.

    Args:
        params: a model, which is best; parameters; (name, parameter) pairs; or parameter groups of either.
        lr: learning rate, a number or a tensor of one.
        weight_decay: decoupled; it acts on the weight before the update.
        momentum: of the moving average, in [0, 1).
        nesterov: whether the gradient is mixed in once more.
        ns_steps: Newton-Schulz iterations, at least 1.
        ns_eps: the least norm to divide by (``eps`` of ``torch.optim.Muon``).
        ns_dtype: what the iterations are computed in: "bfloat16", as in ``torch.optim.Muon``; or "state", float32, and
            float64 for float64 weights. Runs on other numbers of ranks agree to rounding of that dtype.
        exchange_dtype: what whole matrices travel in: "auto", as ``ns_dtype``, which rounds nothing that the iterations
            would not round; "bfloat16", by which their input and their result are rounded to bfloat16 on every number
            of ranks, one included; or "state".
        split: which rows are orthogonalized as if they were a matrix of their own: None, all of a matrix; "head", the
            rows of each head of query, key and value projections, fused or not, which the model must say; or in a group
            of fused matrices how many rows each block has, such as (queries, keys, values).
        adjust_lr_fn: "original" or None, by which the update is multiplied by sqrt(max(1, m/n)); or "match_rms_adamw",
            0.2 sqrt(max(m, n)), for learning rates of AdamW.
        betas, eps: of AdamW.
        adam_lr: learning rate of AdamW, which follows the schedule of ``lr``; None for the same. Groups keep it as
            ``adam_lr_ratio``, the ratio of both.
        maximize: follow the negated gradients.
        stochastic_rounding, adam_dtype: as of ``APOLLO``.
        seed, cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group, unknown: as of
            ``APOLLO``; the seed matters where a group names a rule with projections.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.MUON

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        ns_dtype: str = "bfloat16",
        adjust_lr_fn: str | None = "original",
        exchange_dtype: str = "auto",
        split: str | Sequence[int] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
            params, lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
            ns_eps=ns_eps, ns_dtype=ns_dtype, adjust_lr_fn=adjust_lr_fn,
            exchange_dtype=exchange_dtype, split=split, betas=betas, eps=eps, maximize=maximize,
            stochastic_rounding=stochastic_rounding, adam_dtype=adam_dtype,
            seed=seed, cache_projection=cache_projection, kernels=kernels, skip_nonfinite=skip_nonfinite,
            max_skipped_steps=max_skipped_steps, model=model, process_group=process_group, **unknown,
        )  # fmt: skip
