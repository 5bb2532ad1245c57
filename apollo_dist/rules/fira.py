r"""Fira, from "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (arXiv 2410.01623).

For a matrix with low-rank gradient :math:`R = G P^\top`, stored (channels, r):

.. math::
    M &= \beta_1 M + (1 - \beta_1) R, \qquad V = \beta_2 V + (1 - \beta_2) R \odot R, \qquad
    N = M / (\sqrt{V} + \epsilon) \\
    \phi_c &= \|N_c\| / (\|R_c\| + 10^{-8}), \qquad S_c = \phi_c (G_c - \alpha R_c P), \qquad
    \ell = \max(\|S\| / (\text{last} + 10^{-8}), \gamma) / \gamma, \qquad \text{last} = \|S\| / \ell \\
    W &\leftarrow W - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} (\alpha N P + S / \ell), \qquad
    W \leftarrow W - \eta \lambda W

:math:`\alpha` is ``scale``; as in the authors' code it is inside of the residual too, and S is not multiplied by it.
The limiter (:math:`\ell`, in ``limiter.py``) is of S alone. S is never formed:

.. math:: \|G_c - \alpha R_c P\|^2 = \|G_c\|^2 - 2 \alpha \|R_c\|^2 + \alpha^2 R_c (P P^\top) R_c^\top
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Group, Reply, Seen, Spec, Update
from .limiter import NORM_EPS, limit
from .low_rank import ADAM, RANK, LowRank, projection
from .options import Option, positive


class Fira(LowRank):
    """Fira's update of a matrix."""

    name = "Fira"
    options: Mapping[str, Option] = {**ADAM, "rank": RANK, "scale": Option(1.0, positive, "alpha"), **projection("svd")}

    def spec(self, m: int, n: int, group: Group) -> Spec:
        """The owner sees R, the channels' norms and P P^T, and answers with phi, -alpha phi R and alpha N.

        The last two travel as one, once the limiter is known.
        """
        reduce = self.reduces(group, channel_norms=True, gram=True)
        reply = Reply(scale=True, terms=1, residual=True, direct=True)
        return Spec(reduce, reply, self.moments(group, "last_norm"))

    def owner_step(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Update:
        """The moments, and the two parts of the update."""
        assert seen.norms is not None
        low_rank, alpha = seen.low_rank, group["scale"]
        normalized = self.normalized(seen, state, group)
        norms = torch.linalg.vector_norm(low_rank, dim=1)
        phi = torch.linalg.vector_norm(normalized, dim=1) / (norms + NORM_EPS)
        squares = seen.norms.square() - 2 * alpha * norms.square() + alpha**2 * seen.squares_of_products(low_rank)
        # Rounding may leave less than nothing where P spans the whole gradient.
        terms = seen.square_sums(phi * squares.clamp_min(0.0).sqrt())[:, None]
        return Update(phi, terms, residual=low_rank * (-alpha * phi)[:, None], direct=normalized * alpha)

    def matrix_step(
        self, terms: Tensor, state: Mapping[str, Tensor], group: Group
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The limiter, of S alone."""
        factor, last = limit(terms[:, 0].sqrt().to(state["last_norm"].dtype), state["last_norm"])
        return factor, {"last_norm": last}
