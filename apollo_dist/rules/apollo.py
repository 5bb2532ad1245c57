r"""The APOLLO rule: tensors in, tensors out; nothing here knows about ranks.

From "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270), for a matrix with gradient :math:`G` and
low-rank gradient :math:`R` stored (channels, r):

.. math::
    M &= \beta_1 M + (1 - \beta_1) R, \qquad V = \beta_2 V + (1 - \beta_2) R \odot R, \qquad
    N = M / (\sqrt{V} + \epsilon) \\
    s_c &= \|N_c\| / (\|R_c\| + 10^{-8}) \ \text{(channel)}, \qquad
    s = \|N\| / (\|R\| + 10^{-8}) \ \text{(tensor)} \\
    U &= s \, G, \qquad \ell = \max(\|U\| / (\text{last} + 10^{-8}), \gamma) / \gamma, \qquad
    \text{last} = \|U\| / \ell \\
    W &\leftarrow W - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \sqrt{\text{scale}} \; U / \ell, \qquad
    W \leftarrow W - \eta \lambda W

The norm-growth limiter (:math:`\ell`, :math:`\gamma = 1.01`) is Fira's, eq. 4 of the paper. :math:`\|U\|` follows from
the channels' squared gradient norms: :math:`\|U\|^2 = \sum_c s_c^2 \|G_c\|^2`, so :math:`U` is never formed.

Moments, scales and norms are float32 (float64 for float64 weights). No function waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adam import adam

NORM_EPS = 1e-8
GAMMA = 1.01


def bias_correction(step: int, betas: tuple[float, float]) -> float:
    """:math:`\\sqrt{1 - \\beta_2^t} / (1 - \\beta_1^t)` at step t, counted from 1."""
    return math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def step_size(lr: float | Tensor, step: int, betas: tuple[float, float], like: Tensor) -> float | Tensor:
    """The learning rate times the bias correction at ``step``.

    A tensor ``lr`` (one number, on the device of ``like`` or on the CPU) is not waited for: the result is then a scalar
    tensor of the dtype of ``like``, where lr is.
    """
    correction = bias_correction(step, betas)
    return lr.reshape(()).to(like.dtype) * correction if isinstance(lr, Tensor) else lr * correction


def decay(weights: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """Decoupled weight decay, in place, on weights of one device and dtype."""
    if not weight_decay or not weights:
        return
    if isinstance(lr, Tensor):
        factor = 1.0 - lr.reshape(()).to(weights[0].dtype) * weight_decay
        torch._foreach_mul_(weights, factor.to(weights[0].device, non_blocking=True))
    else:
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)


def normalize(
    exp_avg: Tensor, exp_avg_sq: Tensor, low_rank: Tensor, out: Tensor, *, betas: tuple[float, float], eps: float
) -> None:
    r"""Update both moments in place with the low-rank gradient R and write N; all (channels, r).

    One pass: torch's fused Adam kernel, asked to move a zero tensor by :math:`M / (\sqrt{V} + \epsilon)`. Its bias
    corrections are always those of step 1, and its lr and eps are chosen to cancel them. The operator is called
    itself, without the function around it in ``torch.optim``, which takes longer than the arithmetic on small tensors.
    """
    first, second = 1.0 - betas[0], math.sqrt(1.0 - betas[1])
    torch._fused_adam_(
        [out.zero_()],
        [low_rank],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.ones((), dtype=torch.float32, device=low_rank.device)],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-first / second,
        weight_decay=0.0,
        eps=eps / second,
        maximize=False,
    )


def as_gemm_operand(projection: Tensor) -> Tensor:
    """P^T of a projection P, (r, size), as ``project`` takes it: (size, r), or with r = 1 on CPU (size, 2).

    A single column gets a zero beside it, since BLAS takes less than half the time for two, unless memory is the
    limit. Several are copied, so that a row of P^T lies in one piece, which BLAS multiplies with a little faster.
    """
    if projection.device.type != "cpu":
        return projection.t()
    if projection.shape[0] == 1:
        return torch.cat([projection, torch.zeros_like(projection)]).t()
    return projection.t().contiguous()


def project(grad: Tensor, columns: Tensor, out: Tensor) -> None:
    """The low-rank gradient G P^T of a channels-first gradient; written to ``out``, (channels, r)."""
    if out.shape[1] > 1:
        torch.mm(grad, columns, out=out)
    elif columns.shape[1] == 1 or grad.stride(1) != 1:
        torch.mv(grad, columns[:, 0], out=out[:, 0])
    else:
        out.copy_(torch.mm(grad, columns)[:, :1])


def channel_norms(grad: Tensor, out: Tensor) -> None:
    """The norm of each row of a channels-first gradient; written to ``out``, (channels,)."""
    if grad.device.type == "cpu" and grad.stride(0) == 1 and grad.stride(1) != 1:
        # A wide matrix comes transposed. torch reduces over its strided dimension without vectorizing; sums of squares
        # over blocks of rows that stay in the cache are several times faster.
        blocks = torch.split(grad.t(), 128)
        squares = blocks[0].square()
        for block in blocks[1:]:
            squares[: block.shape[0]].addcmul_(block, block)
        torch.sum(squares, 0, out=out).sqrt_()
    else:
        torch.linalg.vector_norm(grad, dim=1, out=out)


def line_norms(grad: Tensor) -> Tensor:
    """The norms of a gradient's rows, or of its columns where those lie one after the other: the faster ones."""
    lines: Tensor = torch.linalg.vector_norm(grad, dim=1 if grad.stride(1) == 1 else 0)
    return lines


def channel_scale(normalized_norm: Tensor, low_rank_norm: Tensor) -> Tensor:
    """The scaling factor of each channel (or of a tensor), from the norms of N and R."""
    return normalized_norm / (low_rank_norm + NORM_EPS)


def limit(norm: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The norm-growth limiter, elementwise over matrices.

    Args:
        norm: the update's norm before limiting.
        last: the norm after limiting of the last step that moved; 0 while there was none.

    Returns:
        The factor 1 / l that limits the update, and the new ``last``. A norm of zero changes nothing: it must not arm
        the limiter, which would hold the matrix at 1e-8 for over a thousand steps.
    """
    # An update of norm 0 gives a factor of min(infinity, 1).
    reach = torch.where(last > 0, GAMMA * (last + NORM_EPS), math.inf)
    factor = (reach / norm).clamp_max_(1.0)
    return factor, torch.where(norm > 0, norm * factor, last)


def adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    r"""AdamW, in place, for tensors without a low rank: the rule above with :math:`U = M / (\sqrt{V} + \epsilon)`.

    All lists have equal lengths and tensors of one device and dtype. This form puts the bias correction outside of
    :math:`\epsilon` as the low-rank rule does; torch's puts it inside, so its fused kernel gets
    :math:`\epsilon / \sqrt{1 - \beta_2^t}`. Decay acts on the new weight. ``maximize`` negates the gradients.
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
        eps=eps / math.sqrt(1.0 - betas[1] ** step),
        maximize=maximize,
    )
    decay(weights, lr, weight_decay)
