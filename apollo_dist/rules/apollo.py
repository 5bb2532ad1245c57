r"""APOLLO, from "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270).

For a matrix with gradient :math:`G` and low-rank gradient :math:`R`, stored (channels, r):

.. math::
    M &= \beta_1 M + (1 - \beta_1) R, \qquad V = \beta_2 V + (1 - \beta_2) R \odot R, \qquad
    N = M / (\sqrt{V} + \epsilon) \\
    s_c &= \|N_c\| / (\|R_c\| + 10^{-8}) \ \text{(channel)}, \qquad
    s = \|N\| / (\|R\| + 10^{-8}) \ \text{(tensor)} \\
    U &= s \, G, \qquad \ell = \max(\|U\| / (\text{last} + 10^{-8}), \gamma) / \gamma, \qquad
    \text{last} = \|U\| / \ell \\
    W &\leftarrow W - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \sqrt{\text{scale}} \; U / \ell, \qquad
    W \leftarrow W - \eta \lambda W

The norm-growth limiter (:math:`\ell`, :math:`\gamma = 1.01`) is in ``limiter.py``. :math:`\|U\|` follows from the
channels' gradient norms, :math:`\|U\|^2 = \sum_c s_c^2 \|G_c\|^2`, so :math:`U` is never formed.

Moments, scales and norms are float32 (float64 for float64 weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.adam import adam_direction
from .base import Group, MatrixRule, Reduce, Reply, Seen, Spec, State, Update
from .limiter import NORM_EPS, limit
from .options import BETAS, Option, flag, integer, not_negative, one_of, optional, positive


class APOLLO(MatrixRule):
    """APOLLO's update of a matrix; ``rank=None`` leaves a group's parameters to the other rule."""

    name = "APOLLO"
    chosen = True
    spec_options = ("rank", "scale_type", "disable_nl", "proj_type")
    options: Mapping[str, Option] = {
        "betas": BETAS,
        "eps": Option(1e-6, not_negative),
        "rank": Option(256, optional(integer(1))),
        "scale": Option(1.0, positive),
        "scale_type": Option("channel", one_of(("channel", "tensor"), '"channel" or "tensor"')),
        "update_proj_gap": Option(200, integer(1)),
        "proj": Option("random", one_of(("random",), '"random" (the only projection of APOLLO that needs no SVD)')),
        "proj_type": Option("std", one_of(("std", "rademacher"), '"std" (normal entries) or "rademacher" (signs)')),
        "scale_front": Option(False, flag),
        "disable_nl": Option(False, flag),
    }

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """All that is in a group with a rank; whether that is a matrix is checked when the step is planned."""
        return group["rank"] is not None

    def refuses_change(self, before: Group, now: Group) -> str:
        """Moments of one rank say nothing of another."""
        old, new = before["rank"], now["rank"]
        what = {True: "AdamW's, in the shape of a parameter", False: "low-rank"}[old is None]
        if None not in (old, new):
            what = f"of rank {old}, which say nothing of another projection"
            if before["proj_type"] != now["proj_type"]:
                return "proj_type was {proj_type!r} and is now another, but moments are of the former".format(**before)
        return "" if old == new else f"rank was {old} and is now {new}, but the moments of its matrices are {what}"

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """By channel the limiter needs sum_c s_c^2 ||G_c||^2; by tensor ||N||^2, ||R||^2, and for it ||G||^2."""
        rank, tensor, limiter = group["rank"], group["scale_type"] == "tensor", not group["disable_nl"]
        state = State({"exp_avg": rank, "exp_avg_sq": rank}, matrix=("last_norm",))
        entries = "gaussian" if group["proj_type"] == "std" else "rademacher"
        reduce = Reduce(low_rank=rank, entries=entries, channel_norms=limiter and not tensor)
        if tensor:
            return Spec(reduce, Reply(terms=2, matrix_norm=limiter), state)
        return Spec(reduce, Reply(scale=True, terms=int(limiter)), state)

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """Moments, and from N and R the scaling factors or what they are made of."""
        low_rank, normalized = seen.low_rank, seen.workspace
        moments = state["exp_avg"], state["exp_avg_sq"]
        adam_direction(*moments, low_rank, normalized, betas=group["betas"], eps=group["eps"])
        if group["scale_type"] == "tensor":
            return Update(terms=torch.stack([seen.square_sums(normalized), seen.square_sums(low_rank)], dim=1))
        # Two calls, not one stacked call: OpenMP gives the same rows to the same thread, so they are still in that
        # core's L2. Measured: 12 % of a CPU step.
        low_rank_norms = torch.linalg.vector_norm(low_rank, dim=1)
        scale = channel_scale(torch.linalg.vector_norm(normalized, dim=1), low_rank_norms)
        return Update(scale, None if seen.norms is None else seen.square_sums(seen.norms * scale)[:, None])

    def matrix_step(
        self, terms: Tensor, state: Mapping[str, Tensor], group: Group
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The scaling factor of the tensor, if it has one, and the limiter."""
        norms = terms.sqrt().to(state["last_norm"].dtype)
        scale = channel_scale(norms[:, 0], norms[:, 1]) if group["scale_type"] == "tensor" else None
        if group["disable_nl"]:
            return scale, {}
        norm = norms[:, -1] if scale is None else scale * norms[:, -1]
        factor, last = limit(norm, state["last_norm"])
        return factor if scale is None else scale * factor, {"last_norm": last}

    def step_size(self, lr: Any, step: int, group: Group) -> Any:
        """With Adam's bias corrections, which are outside of epsilon here."""
        return lr * bias_correction(step, group["betas"])

    def gain(self, group: Group) -> float:
        """The square root of ``scale``, as the authors' code has it."""
        return float(group["scale"] ** 0.5)


def bias_correction(step: int, betas: tuple[float, float]) -> float:
    r""":math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)` at step t, counted from 1."""
    return math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def channel_scale(normalized_norm: Tensor, low_rank_norm: Tensor) -> Tensor:
    """The scaling factor of each channel (or of a tensor), from the norms of N and R."""
    return normalized_norm / (low_rank_norm + NORM_EPS)
