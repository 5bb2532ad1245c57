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

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.table import torch_kernels
from .base import Group, Reply, Seen, Spec, Update
from .limiter import NORM_EPS, limit
from .low_rank import ADAM, RANK, LowRank, projection
from .options import Option, flag, one_of, positive


class APOLLO(LowRank):
    """APOLLO's update of a matrix."""

    name = "APOLLO"
    spec_options = ("rank", "proj", "proj_type", "scale_type", "disable_nl")
    low_rank_numbers = 2
    options: Mapping[str, Option] = {
        **ADAM,
        "rank": RANK,
        "scale": Option(1.0, positive),
        "scale_type": Option("channel", one_of(("channel", "tensor"), '"channel" or "tensor"')),
        **projection("random"),
        "scale_front": Option(False, flag),
        "disable_nl": Option(False, flag),
    }

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """By channel the limiter needs sum_c s_c^2 ||G_c||^2; by tensor ||N||^2, ||R||^2, and for it ||G||^2."""
        tensor, limiter = group["scale_type"] == "tensor", not group["disable_nl"]
        state = self.moments(group, "last_norm")
        if tensor:
            return Spec(self.reduces(group), Reply(terms=2, matrix_norm=limiter), state)
        return Spec(self.reduces(group, channel_norms=limiter), Reply(scale=True, terms=int(limiter)), state)

    def low_rank_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group, out: Tensor) -> None:
        """Moments, and the squared norms by channel of N and R."""
        (seen.kernels or torch_kernels()).moments(
            state["exp_avg"], state["exp_avg_sq"], seen.low_rank, *out.unbind(),
            betas=group["betas"], eps=group["eps"], workspace=seen.workspace,
        )  # fmt: skip

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """From the norms of N and R the scaling factors, or what they are made of."""
        assert seen.made is not None
        normalized, low_rank = seen.made.sqrt().unbind()
        if group["scale_type"] == "tensor":
            return Update(terms=torch.stack([seen.square_sums(normalized), seen.square_sums(low_rank)], dim=1))
        scale = channel_scale(normalized, low_rank)
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

    def gain(self, group: Group) -> float:
        """The square root of ``scale``, as the authors' code has it."""
        return float(group["scale"] ** 0.5)


def channel_scale(normalized_norm: Tensor, low_rank_norm: Tensor) -> Tensor:
    """The scaling factor of each channel (or of a tensor), from the norms of N and R."""
    return normalized_norm / (low_rank_norm + NORM_EPS)
