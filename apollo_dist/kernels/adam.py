"""Adam's moments and steps by torch's fused kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adam import adam


def bias_correction(step: int, betas: tuple[float, float]) -> float:
    r""":math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)` at step t, counted from 1."""
    return float(math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step))


def adam_direction(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, out: Tensor, *, betas: tuple[float, float], eps: float
) -> None:
    r"""Update both moments in place with ``grad`` and write :math:`M / (\sqrt{V} + \epsilon)`; all of one shape.

    One pass: torch's fused Adam kernel, asked to move a zero tensor by that. Its bias corrections are always those of
    step 1, and its lr and eps are chosen to cancel them. The operator is called itself, without the function around it
    in ``torch.optim``, which takes longer than the arithmetic on small tensors.
    """
    first, second = 1.0 - betas[0], math.sqrt(1.0 - betas[1])
    torch._fused_adam_(
        [out.zero_()],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.ones((), dtype=torch.float32, device=grad.device)],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-first / second,
        weight_decay=0.0,
        eps=eps / second,
        maximize=False,
    )


def adam_step(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    maximize: bool,
) -> None:
    """Adam's step as torch defines it (bias corrections inside of ``eps``), in place, without weight decay.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: of equal lengths and shapes, one device and dtype.
        step: counted from 1.
        lr: a number, or a tensor of one, which is not waited for.
        betas, eps: Adam's.
        maximize: negate the gradients.
    """
    if not weights:
        return
    first = weights[0]
    # The kernel counts the step up itself, in place, once for each tensor.
    steps = list(torch.full((len(weights),), float(step - 1), dtype=torch.float32, device=first.device).unbind())
    adam(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        # The kernel of an accelerator reads a tensor as float32.
        lr=lr.reshape(()).float() if isinstance(lr, Tensor) and lr.device.type != "cpu" else lr,
        weight_decay=0.0,
        eps=eps,
        maximize=maximize,
    )
