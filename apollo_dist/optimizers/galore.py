"""GaLore and Fira as ``torch.optim.Optimizer``; their arithmetic is in ``rules/galore.py`` and ``rules/fira.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer
from .signatures import with_defaults


class GaLore(ShardedOptimizer):
    """GaLore (arXiv 2403.03507), exact under every layout.

    Low-rank matrices move along N P, Adam's direction in the projected space; all other parameters take AdamW with the
    same lr, betas, eps, bias correction and decay.

    Args:
        params: as of ``APOLLO``: a model, which is best, or parameter groups; those with ``rank`` are low-rank.
        lr: learning rate, a number or a tensor of one (which a step never waits for).
        betas, eps, weight_decay: as in AdamW; eps is outside of the bias corrections, and the decay acts on the new
            weight.
        rank: r, where the library chooses. Matrices (m, n) with min(m, n) < r go to AdamW, and the log names them.
        scale: alpha, by which the update of low-rank matrices is multiplied.
        update_proj_gap: steps between refreshes of the projections.
        proj: "svd", P is made of the leading singular directions of the gradient of a refresh, by one rank in float64
            from the whole matrix; it is state. Or "subspace", nearly those directions, by subspace iteration (2 rounds,
            8 oversampled), which is cheaper. Or "random", P follows from the seed.
        refresh: "together", all projections that are state are made anew in the same step, or "spread", each in one of
            the ``update_proj_gap`` steps that follows from its name.
        projection_dtype: of projections that are state: None, that of states; or torch.bfloat16, to which they are
            rounded once when they are made, for half of their memory and traffic.
        proj_type: of random projections, as of ``APOLLO``.
        maximize: follow the negated gradients.
        stochastic_rounding, adam_dtype: as of ``APOLLO``.
        seed, exclude, embeddings, cache_projection, kernels, skip_nonfinite, max_skipped_steps, model, process_group,
            unknown: as of ``APOLLO``.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.GALORE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 256,
        scale: float = 0.25,
        update_proj_gap: int = 200,
        proj: str = "svd",
        refresh: str = "together",
        projection_dtype: torch.dtype | str | None = None,
        proj_type: str = "std",
        maximize: bool = False,
        stochastic_rounding: bool = False,
        adam_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        exclude: str | None = None,
        embeddings: str = "adamw",
        cache_projection: bool | str = "auto",
        kernels: str = "auto",
        skip_nonfinite: bool = False,
        max_skipped_steps: int | None = 10,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            params, lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, scale=scale,
            update_proj_gap=update_proj_gap, proj=proj, proj_type=proj_type, refresh=refresh,
            projection_dtype=projection_dtype,
            maximize=maximize, stochastic_rounding=stochastic_rounding, adam_dtype=adam_dtype,
            seed=seed, exclude=exclude, embeddings=embeddings, cache_projection=cache_projection, kernels=kernels,
            skip_nonfinite=skip_nonfinite, max_skipped_steps=max_skipped_steps, model=model,
            process_group=process_group, **unknown,
        )  # fmt: skip


@with_defaults(scale=1.0)
class Fira(GaLore):
    """Fira (arXiv 2410.01623), exact under every layout: GaLore's update and a scaled residual of the gradient.

    Takes the arguments of ``GaLore``. ``scale`` is alpha of N P and inside of the residual; its default is 1.0. The
    residual has the norm-growth limiter, for itself.
    """

    rules = builtin.FIRA
