r"""SCALE: SGD with normalized columns and momentum in the last layer (arXiv 2506.16659).

A channel is a row of a linear map's weight (out x in), and a column of an embedding (vocabulary x d):

.. math::
    U_c = X_c / \max(\sqrt{\mathrm{mean}(X_c^2)}, \epsilon), \qquad
    W \leftarrow (1 - \eta \lambda) W - \eta U

X is the gradient, and of the output head :math:`B \leftarrow \mu B + (1 - \mu) G`, without bias correction. The paper
divides by the norm of a channel, the authors' code by its root mean square, as here: its learning rates are for that.
All parameters that are no linear maps or embeddings (norms, biases, tables) take AdamW in Hugging Face's form, but with
the weight decay first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import adamw
from .base import Group, MatrixRule, Reduce, Reply, Seen, Spec, State, Update
from .options import ADAM_DTYPE, BETAS, Option, decay_rate, not_negative, one_of, optional, positive
from .roles import BIAS, EMBEDDING, HEAD, NORM, OTHER, ROLE


class SCALE(MatrixRule):
    """Of ``axis`` and ``momentum`` None means: as the paper has it for what the parameter is in the model."""

    name = "SCALE"
    decay_first = True
    reads_role = True
    spec_options = ("axis", "momentum")
    options: Mapping[str, Option] = {
        "momentum": Option(None, optional(decay_rate)),
        "axis": Option(None, one_of(("rows", "columns", None), '"rows", "columns" or None')),
        "eps": Option(1e-8, positive),
    }

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """Linear maps, stacks of them, and embeddings."""
        return super().takes(shape, group) and group[ROLE].kind not in (NORM, BIAS, OTHER)

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """The owner sees each channel's root mean square, and answers with one over it."""
        axis = group["axis"] or ("columns" if group[ROLE].kind == EMBEDDING else "rows")
        reduce = Reduce(axis, channel_norms=True, root_mean_square=True, of_carrier=True)
        if not momentum(group):
            return Spec(reduce, Reply(scale=True))
        return Spec(reduce, Reply(scale=True), State(element=("momentum_buffer",)), carrier="momentum_buffer")

    def refuses_change(self, before: Group, now: Group) -> str:
        """Where there was no momentum, there is no state of it."""
        old, new = before["momentum"], now["momentum"]
        if old == new or (old and new):
            return ""
        return f"momentum was {old} and is now {new}, and matrices without momentum have no state"

    def element_step(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> None:
        """The momentum."""
        state["momentum_buffer"].lerp_(grad, 1 - momentum(group))

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """One over the root mean square of each channel."""
        assert seen.norms is not None
        return Update(1 / seen.norms.clamp_min(group["eps"]))


def momentum(group: Group) -> float:
    """The momentum of a matrix: the group's, or where that says none 0.9 of the output head."""
    chosen = group["momentum"]
    return float((0.9 if group[ROLE].kind == HEAD else 0.0) if chosen is None else chosen)


class DecayFirst(adamw.AdamW):
    """AdamW in Hugging Face's form, with the weight decay first, and with a learning rate of its own."""

    name = "AdamW, decay first"
    decay_first = True
    options: Mapping[str, Option] = {
        "betas": BETAS,
        "eps": Option(1e-8, not_negative),
        "adam_lr_ratio": Option(1.0, positive),
        "adam_dtype": ADAM_DTYPE,
    }

    def learning_rate(self, group: Group) -> Any:
        """It follows the schedule of the matrices."""
        return group["lr"] * group["adam_lr_ratio"]

    def update(
        self, weights: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Group
    ) -> None:
        """One fused pass."""
        super().update(weights, grads, state, step, {**group, "lr": self.learning_rate(group)})
