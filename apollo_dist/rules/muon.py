r"""Muon: momentum, orthogonalized (K. Jordan and others, 2024; equations and names as of ``torch.optim.Muon``).

.. math::
    B &= \mu B + (1 - \mu) G, \qquad X = (1 - \mu) G + \mu B \ \text{(Nesterov)}, \ \text{or} \ X = B \\
    X &\leftarrow X / \max(\|X\|_F, \epsilon), \qquad \text{5 times} \ A = X X^\top, \
    X \leftarrow a X + (b A + c A^2) X \\
    W &\leftarrow (1 - \eta \lambda) W, \qquad W \leftarrow W - \eta \, \rho \, X

X is transposed before the iterations where it has more rows than columns, and afterwards. :math:`\rho` is
:math:`\sqrt{\max(1, m / n)}` ("original"), or :math:`0.2 \sqrt{\max(m, n)}` ("match_rms_adamw", arXiv 2502.16982).

With ``split`` rows are divided into blocks, such as heads, each of which is taken for a matrix of its own.

Iterations in bfloat16 begin and end with numbers rounded to it, so these travel so without another rounding, and
:math:`\rho` comes later. ``exchange_dtype="bfloat16"`` rounds both for other iterations, too, on one rank as on many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from . import scale
from .base import Group, MatrixRule, Reduce, Spec, State
from .options import Option, decay_rate, flag, integer, one_of, positive
from .orthogonal import check_split, newton_schulz, rows_of_blocks
from .roles import BIAS, EMBEDDING, HEAD, NORM, OTHER, ROLE


class Muon(MatrixRule):
    """Hidden matrices; embeddings, output heads, norms, biases and tables are left to AdamW."""

    name = "Muon"
    decay_first = True
    reads_role = True
    spec_options: tuple[str, ...] = ("ns_dtype", "exchange_dtype", "split")
    options: Mapping[str, Option] = {
        "momentum": Option(0.95, decay_rate),
        "nesterov": Option(True, flag),
        "ns_steps": Option(5, integer(1)),
        "ns_eps": Option(1e-7, positive),
        "ns_dtype": Option("bfloat16", one_of(("bfloat16", "state"), '"bfloat16" or "state" (the dtype of states)')),
        "adjust_lr_fn": Option(
            "original", one_of(("original", "match_rms_adamw", None), '"original", "match_rms_adamw" or None')
        ),
        "exchange_dtype": Option(
            "auto", one_of(("auto", "bfloat16", "state"), '"auto" (as ns_dtype), "bfloat16" or "state"')
        ),
        "split": Option(None, check_split),
    }

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """Linear maps and stacks of them."""
        return super().takes(shape, group) and group[ROLE].kind not in (EMBEDDING, HEAD, NORM, BIAS, OTHER)

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """One owner gets X; every rank keeps the momentum of its elements."""
        rows_of_blocks(m, n, group)
        travels = group["ns_dtype"] if group["exchange_dtype"] == "auto" else group["exchange_dtype"]
        reduce = Reduce("rows", whole=True, whole_in_bfloat16=travels == "bfloat16")
        return Spec(reduce, state=State(element=("momentum_buffer",)))

    def element_step(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> None:
        """The momentum."""
        state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])

    def source(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> Tensor:
        """X."""
        momentum = state["momentum_buffer"]
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def whole_step(self, whole: Tensor, group: Group) -> Tensor:
        """The orthogonalized X, without rho."""
        whole = whole.to(torch.bfloat16) if group["ns_dtype"] == "bfloat16" else whole
        how = group["ns_steps"], group["ns_eps"]
        blocks = rows_of_blocks(whole.shape[0], whole.shape[1], group)
        if len(blocks) == 1:
            return newton_schulz(whole, *how)
        if len(set(blocks)) == 1:  # in one launch
            return newton_schulz(whole.reshape(len(blocks), blocks[0], -1), *how).reshape(whole.shape)
        return torch.cat([newton_schulz(part, *how) for part in torch.split(whole, blocks)])

    def finish(self, part: Tensor, row: int, shape: tuple[int, int], group: Group) -> None:
        """Rho of each block."""
        blocks = rows_of_blocks(shape[0], shape[1], group)
        if len(set(blocks)) == 1:
            part.mul_(adjustment(blocks[0], shape[1], group["adjust_lr_fn"]))
            return
        for rows, end in zip(blocks, accumulate(blocks), strict=True):
            mine = part[max(end - rows - row, 0) : max(end - row, 0)]
            mine.mul_(adjustment(rows, shape[1], group["adjust_lr_fn"]))


def adjustment(m: int, n: int, kind: str | None) -> float:
    """Rho of an m x n matrix."""
    return 0.2 * math.sqrt(max(m, n)) if kind == "match_rms_adamw" else math.sqrt(max(1.0, m / n))


class Rest(scale.DecayFirst):
    """AdamW in PyTorch's form, with a learning rate of its own that follows the schedule of the matrices."""

    name = "torch's AdamW, adam_lr"
    corrects_first = True
