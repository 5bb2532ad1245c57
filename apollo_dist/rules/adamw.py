r"""AdamW, element by element, in two forms.

Both keep :math:`M = \beta_1 M + (1 - \beta_1) G` and :math:`V = \beta_2 V + (1 - \beta_2) G \odot G`. The authors of
APOLLO use Hugging Face's form for parameters without a low rank (``AdamW``), with the bias corrections outside of
:math:`\epsilon`, and weight decay last:

.. math::
    W \leftarrow W - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} M / (\sqrt{V} + \epsilon), \qquad
    W \leftarrow W - \eta \lambda W

PyTorch's form (``TorchAdamW``) decays first, and has the correction of V inside:

.. math::
    W \leftarrow W - \eta \lambda W, \qquad
    W \leftarrow W - \frac{\eta}{1 - \beta_1^t} M / (\sqrt{V / (1 - \beta_2^t)} + \epsilon)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.adam import adam_step, bias_correction
from .base import ElementRule, Group
from .options import ADAM_DTYPE, BETAS, DTYPES, Option, not_negative


class AdamW(ElementRule):
    """Hugging Face's form.

    Attributes:
        corrects_first: whether epsilon is added to the corrected root of V, as in PyTorch's form.
    """

    name = "AdamW"
    corrects_first = False
    state = ("exp_avg", "exp_avg_sq")
    spec_options = ("adam_dtype",)
    options: Mapping[str, Option] = {"betas": BETAS, "eps": Option(1e-6, not_negative), "adam_dtype": ADAM_DTYPE}

    def state_dtype(self, group: Group) -> torch.dtype | None:
        """``adam_dtype``."""
        return DTYPES[group.get("adam_dtype")]

    def refuses_change(self, before: Group, now: Group) -> str:
        """The state has its dtype."""
        old, new = before.get("adam_dtype"), now.get("adam_dtype")
        return "" if DTYPES[old] == DTYPES[new] else f"adam_dtype was {old} and is now {new}"

    def adam(self, step: int, group: Group) -> tuple[float, float] | None:
        """Where the root of V is corrected before, the inverse of that is outside of both, and epsilon has it, too."""
        eps = float(group["eps"])
        if self.corrects_first:
            eps *= math.sqrt(1.0 - group["betas"][1] ** step)
        return bias_correction(step, group["betas"]), eps

    def update(
        self, weights: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Group
    ) -> None:
        """One fused pass. The kernel adds epsilon to the corrected root of V."""
        eps = float(group["eps"])
        if not self.corrects_first:
            eps = eps / math.sqrt(1.0 - group["betas"][1] ** step)
        adam_step(
            weights,
            grads,
            *(state[name] for name in self.state),
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=eps,
            maximize=group["maximize"],
        )


class TorchAdamW(AdamW):
    """PyTorch's form."""

    name = "torch's AdamW"
    decay_first = True
    corrects_first = True
    options: Mapping[str, Option] = {"betas": BETAS, "eps": Option(1e-8, not_negative), "adam_dtype": ADAM_DTYPE}
