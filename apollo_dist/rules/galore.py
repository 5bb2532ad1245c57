r"""GaLore, from "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507).

For a matrix with low-rank gradient :math:`R = G P^\top`, stored (channels, r):

.. math::
    M &= \beta_1 M + (1 - \beta_1) R, \qquad V = \beta_2 V + (1 - \beta_2) R \odot R, \qquad
    N = M / (\sqrt{V} + \epsilon) \\
    W &\leftarrow W - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \, \alpha \, N P, \qquad
    W \leftarrow W - \eta \lambda W

The moments are neither reset nor rotated when P changes, as in the authors' code. Their :math:`\epsilon` is outside of
the bias corrections. :math:`\alpha` is ``scale``. There is no limiter.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import NO_CARRIER, Group, Reply, Seen, Spec, Update
from .low_rank import ADAM, RANK, LowRank, projection
from .options import Option, positive


class GaLore(LowRank):
    """GaLore's update of a matrix."""

    name = "GaLore"
    options: Mapping[str, Option] = {**ADAM, "rank": RANK, "scale": Option(0.25, positive), **projection("svd")}

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """The owner sees R, and answers with N; the gradient itself is not used."""
        return Spec(self.reduces(group), Reply(direct=True), self.moments(group), NO_CARRIER)

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """The moments, and N."""
        return Update(direct=self.normalized(seen, state, group))

    def gain(self, group: Group) -> float:
        """``scale``."""
        return float(group["scale"])
