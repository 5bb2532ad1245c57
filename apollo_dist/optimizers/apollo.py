"""APOLLO and APOLLO-Mini as ``torch.optim.Optimizer``; their arithmetic is in ``rules/apollo.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rules import builtin
from .base import ShardedOptimizer
from .signatures import with_defaults


class APOLLO(ShardedOptimizer):
    r"""APOLLO (arXiv 2412.05270), exact under every layout: plain, DDP, FSDP2, HSDP and DeepSpeed ZeRO.

    Low-rank matrices follow the rule in ``apollo_dist.rules.apollo``; all other parameters take AdamW with the same
    lr, betas, eps, bias correction and decay.

    Args:
        params: a model, which is best: linear maps inside repeated blocks become low-rank (``docs/choice.md`` has the
            rule, ``apollo_dist.describe(model)`` prints the choice). Or parameter groups, where a group with ``rank``
            is low-rank and one without is AdamW; if no group has ``rank``, or for parameters without groups, they are
            chosen as for a model where it is known, else by name (without names, every matrix). Parameters may come
            as (name, parameter) pairs, or with ``param_names`` in their group; all of them or none.
        lr: learning rate, a number or a tensor of one (which a step never waits for).
        betas, eps, weight_decay: as in AdamW; the decay is decoupled and acts on the new weight.
        rank: r, where the library chooses. Matrices (m, n) with min(m, n) < r go to AdamW, and the log names them.
        scale: the update is multiplied by its square root.
        scale_type: "channel" for one scaling factor for each channel, "tensor" for one for each matrix.
        update_proj_gap: steps between redraws of the projections.
        seed: of the projections; equal on all ranks.
        proj: "random", P follows from the seed; or "svd", it is made of the leading singular directions of the gradient
            of a refresh, by one rank in float64 from the whole matrix, and is state; or "subspace", nearly those.
        refresh: "together", all projections that are state are made anew in the same step, or "spread", each in one of
            the ``update_proj_gap`` steps that follows from its name.
        projection_dtype: of projections that are state: None, that of states; or torch.bfloat16, to which they are
            rounded once when they are made, for half of their memory and traffic.
        proj_type: of random projections "std" for normal entries of P, or "rademacher" for signs, which take one random
            bit each.
        scale_front: accepted; multiplying by ``scale`` before the limiter gives the same result, the limiter being
            a ratio.
        disable_nl: turn the norm-growth limiter off.
        maximize: follow the negated gradients.
        stochastic_rounding: round new weights in bf16 up or down at random, so that the mean is exact, and updates of
            less than half a unit in the last place are not lost. The random bits are a function of (seed, name, step,
            element), so every layout rounds alike. An error where no weight that the step updates is in bf16.
        adam_dtype: of the moments of parameters that take AdamW; torch.bfloat16 halves them, rounded stochastically
            in the same way. Default: float32.
        exclude: where the library chooses, a regular expression of names to leave to AdamW.
        embeddings: where the library chooses, "low_rank" to take embeddings and output heads as well; their state
            shrinks, and the loss is likely to rise (docs/training.md). Default "adamw", as in the paper.
        cache_projection: keep the current projections (True), redraw them from the seed every step (False), or "auto":
            keep them on CPU, redraw on accelerators. The results are identical.
        kernels: what steps compute with: "torch", "triton", or "auto": Triton kernels over many matrices a launch on
            CUDA devices where Triton is installed, torch's operations elsewhere. float64 and what a kernel does not
            know takes torch's operations. The log line of the first step says which.
        skip_nonfinite: leave a step out, on all ranks, with weights and states untouched, where a gradient on any of
            them is infinite or NaN. Costs a pass over the gradients, an all-reduce of one number, and a wait for the
            device. Under ZeRO-1, 2 and 3 DeepSpeed's own check does this.
        max_skipped_steps: with ``skip_nonfinite``, a RuntimeError after more left out in a row; None for no limit.
        model: the model that ``params`` belong to, where that is not the model itself. Parameters without names get
            their names from it, FSDP1's their shapes and places, and parameters that ``fully_shard`` makes after the
            optimizer was built are found in it. It is not kept alive.
        process_group: the ranks that train the same parameters, by default all. They are compared when the optimizer
            is built and at the first step, so every one of them must build it.
        unknown: keywords of other optimizers (foreach, fused, capturable, differentiable, amsgrad, correct_bias,
            no_deprecation_warning, ...) where they ask for what is done anyway; all others are errors.

    Raises:
        ValueError: for bad or unknown arguments, on all ranks alike.
    """

    rules = builtin.APOLLO

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 256,
        scale: float = 1.0,
        scale_type: str = "channel",
        update_proj_gap: int = 200,
        seed: int = 0,
        proj: str = "random",
        refresh: str = "together",
        projection_dtype: torch.dtype | str | None = None,
        proj_type: str = "std",
        scale_front: bool = False,
        disable_nl: bool = False,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        adam_dtype: torch.dtype | str | None = None,
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
            scale_type=scale_type, update_proj_gap=update_proj_gap, seed=seed, proj=proj, proj_type=proj_type,
            refresh=refresh, projection_dtype=projection_dtype, scale_front=scale_front, disable_nl=disable_nl,
            maximize=maximize, stochastic_rounding=stochastic_rounding, adam_dtype=adam_dtype, exclude=exclude,
            embeddings=embeddings, cache_projection=cache_projection, kernels=kernels, skip_nonfinite=skip_nonfinite,
            max_skipped_steps=max_skipped_steps, model=model, process_group=process_group, **unknown,
        )  # fmt: skip


@with_defaults(rank=1, scale=128.0, scale_type="tensor")
class APOLLOMini(APOLLO):
    """APOLLO-Mini: rank 1 with one scaling factor for each matrix, and scale 128.

    Takes the arguments of ``APOLLO``; only the defaults of rank, scale and scale_type differ.
    """
