r"""Muon: momentum, orthogonalized (K. Jordan and others, 2024; equations and names as of ``torch.optim.Muon``).

.. math::
    B &= \mu B + (1 - \mu) G, \qquad X = (1 - \mu) G + \mu B \ \text{(Nesterov)}, \ \text{or} \ X = B \\
    X &\leftarrow X / \max(\|X\|_F, \epsilon), \qquad \text{5 times} \ A = X X^\top, \
    X \leftarrow a X + (b A + c A^2) X \\
    W &\leftarrow (1 - \eta \lambda) W, \qquad W \leftarrow W - \eta \, \rho \, X

X is transposed before the iterations where it has more rows than columns, and afterwards. :math:`\rho` is
:math:`\sqrt{\max(1, m / n)}` ("original"), or :math:`0.2 \sqrt{\max(m, n)}` ("match_rms_adamw", arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import scale
from .base import Group, MatrixRule, Reduce, Spec, State
from .options import Option, decay_rate, flag, integer, one_of, positive
from .roles import BIAS, EMBEDDING, HEAD, NORM, OTHER, ROLE

COEFFICIENTS = 3.4445, -4.775, 2.0315  # a, b, c


class Muon(MatrixRule):
    """Hidden matrices; embeddings, output heads, norms, biases and tables are left to AdamW."""

    name = "Muon"
    decay_first = True
    reads_role = True
    spec_options: tuple[str, ...] = ()
    options: Mapping[str, Option] = {
        "momentum": Option(0.95, decay_rate),
        "nesterov": Option(True, flag),
        "ns_steps": Option(5, integer(1)),
        "ns_eps": Option(1e-7, positive),
        "ns_dtype": Option("bfloat16", one_of(("bfloat16", "state"), '"bfloat16" or "state" (the dtype of states)')),
        "adjust_lr_fn": Option(
            "original", one_of(("original", "match_rms_adamw", None), '"original", "match_rms_adamw" or None')
        ),
    }

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """Linear maps and stacks of them."""
        return super().takes(shape, group) and group[ROLE].kind not in (EMBEDDING, HEAD, NORM, BIAS, OTHER)

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """One owner gets X; every rank keeps the momentum of its elements."""
        return Spec(Reduce("rows", whole=True), state=State(element=("momentum_buffer",)))

    def element_step(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> None:
        """The momentum."""
        state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])

    def source(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> Tensor:
        """X."""
        momentum = state["momentum_buffer"]
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def whole_step(self, whole: Tensor, group: Group) -> Tensor:
        """The orthogonalized X, times rho."""
        dtype = torch.bfloat16 if group["ns_dtype"] == "bfloat16" else whole.dtype
        made = newton_schulz(whole.to(dtype), group["ns_steps"], group["ns_eps"])
        rho = adjustment(whole.shape[0], whole.shape[1], group["adjust_lr_fn"])
        return made.to(whole.dtype).mul(rho)


def newton_schulz(matrix: Tensor, steps: int, eps: float) -> Tensor:
    """A matrix with singular values pushed towards 1, in its dtype."""
    a, b, c = COEFFICIENTS
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def adjustment(m: int, n: int, kind: str | None) -> float:
    """Rho of an m x n matrix."""
    return 0.2 * math.sqrt(max(m, n)) if kind == "match_rms_adamw" else math.sqrt(max(1.0, m / n))


class Rest(scale.DecayFirst):
    """AdamW in PyTorch's form, with a learning rate of its own that follows the schedule of the matrices."""

    name = "torch's AdamW, adam_lr"
    corrects_first = True
