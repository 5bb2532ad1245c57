r"""AdamW as APOLLO's authors use it for parameters without a low rank: Hugging Face's form.

.. math::
    M &= \beta_1 M + (1 - \beta_1) G, \qquad V = \beta_2 V + (1 - \beta_2) G \odot G \\
    W &\leftarrow W - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} M / (\sqrt{V} + \epsilon), \qquad
    W \leftarrow W - \eta \lambda W

The bias corrections are outside of :math:`\epsilon`; torch's AdamW puts them inside, and decays the weight first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..kernels.adam import adam_step
from .base import ElementRule, Group


class AdamW(ElementRule):
    """Options read: lr, betas, eps, maximize."""

    name = "AdamW"
    state = ("exp_avg", "exp_avg_sq")

    def update(
        self, weights: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Group
    ) -> None:
        """One fused pass. The kernel divides by its own correction of V, so epsilon is multiplied by that before."""
        adam_step(
            weights,
            grads,
            *(state[name] for name in self.state),
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"] / math.sqrt(1.0 - group["betas"][1] ** step),
            maximize=group["maximize"],
        )
