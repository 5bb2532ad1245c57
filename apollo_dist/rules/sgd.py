r"""SGD with momentum, as ``torch.optim.SGD`` has it.

.. math::
    G \leftarrow G + \lambda W, \qquad B = G \ (t = 1), \quad B = \mu B + (1 - \tau) G \ (t > 1), \qquad
    W \leftarrow W - \eta B \ (\text{Nesterov: } G + \mu B)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import ElementRule, Group
from .options import Option, decay_rate, flag, number


class SGD(ElementRule):
    """Weight decay is added to the gradient; without momentum there is no state."""

    name = "SGD"
    state = ("momentum_buffer",)
    spec_options = ("momentum",)
    options: Mapping[str, Option] = {
        "momentum": Option(0.0, decay_rate),
        "dampening": Option(0.0, number("a number", lambda value: True)),
        "nesterov": Option(False, flag),
    }

    def state_of(self, group: Group) -> tuple[str, ...]:
        """The momentum, if there is one."""
        return self.state if group["momentum"] else ()

    def refuses_change(self, before: Group, now: Group) -> str:
        """Without momentum there is no state of it."""
        old, new = before["momentum"], now["momentum"]
        return (
            "" if bool(old) == bool(new) else f"momentum was {old} and is now {new}, and without one there is no state"
        )

    def weight_decay(self, group: Group) -> float:
        """It is part of the update here."""
        return 0.0

    def update(
        self, weights: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Group
    ) -> None:
        """In the order of torch's."""
        lr, momentum = group["lr"], group["momentum"]
        grads = list(torch._foreach_neg(grads)) if group["maximize"] else grads
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        if momentum:
            buffers = state["momentum_buffer"]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads, alpha=1.0 if step == 1 else 1.0 - group["dampening"])
            grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
        if isinstance(lr, Tensor):
            torch._foreach_add_(weights, torch._foreach_mul(grads, -lr.reshape(()).to(weights[0])))
        else:
            torch._foreach_add_(weights, grads, alpha=-lr)
