r"""Adam-mini: one second moment for each block of a parameter (arXiv 2406.16793; blocks as of its code 1.1.1).

A block b is a head of a query or key projection (its rows together), a row of any other matrix, or a whole norm weight:

.. math::
    M = \beta_1 M + (1 - \beta_1) G, \qquad v_b = \beta_2 v_b + (1 - \beta_2) \, \mathrm{mean}(G_b^2) \\
    W \leftarrow (1 - \eta \lambda) W, \qquad
    W_b \leftarrow W_b - \frac{\eta}{1 - \beta_1^t} M_b / (\sqrt{v_b / (1 - \beta_2^t)} + \epsilon)

Biases take Adam. Norms and biases have no weight decay, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import adamw
from .base import Group, MatrixRule, Reduce, Reply, Seen, Spec, State, Update
from .options import BETAS, Option, integer, not_negative, optional
from .roles import BIAS, KEY, NORM, QUERY, ROLE, UNKNOWN


class AdamMini(MatrixRule):
    """``num_heads`` and ``num_kv_heads`` are for models that do not say how their heads lie."""

    name = "AdamMini"
    decay_first = True
    reads_step = True
    reads_role = True
    spec_options = ("num_heads", "num_kv_heads")
    options: Mapping[str, Option] = {
        "betas": BETAS,
        "eps": Option(1e-8, not_negative),
        "num_heads": Option(None, optional(integer(1))),
        "num_kv_heads": Option(None, optional(integer(1))),
    }

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """Matrices, stacks of them, and vectors that are no biases."""
        vector = len(shape) == 1 and shape[0] > 0
        return (vector or super().takes(shape, group)) and group[ROLE].kind != BIAS

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """The owner of a block sees the root of its mean square, and keeps its second moment."""
        reduce = Reduce("rows", channel_norms=True, root_mean_square=True, block=rows_of_block(m, n, group))
        return Spec(reduce, Reply(scale=True), State({"exp_avg_sq": 1}, element=("exp_avg",)), carrier="exp_avg")

    def refuses_change(self, before: Group, now: Group) -> str:
        """Second moments are of blocks."""
        old, new = ([group[key] for key in self.spec_options] for group in (before, now))
        return "" if old == new else f"num_heads, num_kv_heads were {old} and are now {new}, which makes other blocks"

    def element_step(self, grad: Tensor, state: Mapping[str, Tensor], group: Group) -> None:
        """The first moment."""
        state["exp_avg"].lerp_(grad, 1 - group["betas"][0])

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """The second moment."""
        assert seen.norms is not None
        beta, second = group["betas"][1], state["exp_avg_sq"][:, 0]
        second.lerp_(seen.norms.square(), 1 - beta)
        return Update(1 / ((second / (1 - beta**seen.step)).sqrt() + group["eps"]))

    def step_size(self, lr: Any, step: int, group: Group) -> Any:
        """With the bias correction of the first moment."""
        return lr / (1 - group["betas"][0] ** step)

    def weight_decay(self, group: Group) -> float:
        """None of norms."""
        return 0.0 if group[ROLE].kind == NORM else super().weight_decay(group)


def rows_of_block(m: int, n: int, group: Group) -> int:
    """How many rows of an m x n matrix are one block.

    Raises:
        ValueError: where the rows of a head are not known, or do not divide the matrix.
    """
    role, heads, kv_heads = group[ROLE], group["num_heads"], group["num_kv_heads"]
    if n == 1 or role.kind not in (QUERY, KEY, UNKNOWN):
        return m if n == 1 else 1
    rows = role.head_dim or 0
    if kv_heads and role.kind == KEY:
        rows = m // kv_heads
    elif heads:  # keys may be grouped: their heads are as large as those of queries, which fill the model's width
        rows = (n if role.kind == KEY else m) // heads
    if role.kind == UNKNOWN or not rows or m % rows:
        raise ValueError(
            "AdamMini has one second moment for each head of queries and keys, and does not know how a matrix of shape "
            f"({m}, {n}), {role.kind}, is divided into heads. Pass the model, whose config says it; or num_heads= (and "
            "num_kv_heads= for grouped keys), and the parameters as (name, parameter) pairs"
        )
    return int(rows)


class Bias(adamw.TorchAdamW):
    """Adam, which takes biases: they have no weight decay."""

    name = "Adam"

    def weight_decay(self, group: Group) -> float:
        """None."""
        return 0.0
