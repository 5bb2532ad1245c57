"""APOLLO, dense, slow, in float64, written from the equations: everything else is judged against it.

Nothing here is shared with the package but the projection's random numbers, which are a matter of definition.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from apollo_dist.projections.gaussian import gaussian


@functools.lru_cache(maxsize=4096)
def _projection(seed: int, name: str, refresh: int, r: int, n: int, dtype: torch.dtype, kind: str) -> Tensor:
    """P in float64. Cases of a test have the same names, and it is the same function of them in each."""
    return gaussian(seed, name, refresh, r, n, dtype=dtype, kind=kind).double()


class Reference:
    """One process with whole matrices.

    Args:
        weights: name -> tensor of any shape; copied to float64.
        ranks: name -> rank for the low-rank matrices; the others take AdamW.
        draw_dtype: what the projections are drawn in (the dtype of the run that is judged).
    """

    def __init__(
        self, weights, ranks, *, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, scale=1.0,
        scale_type="channel", update_proj_gap=200, seed=0, disable_nl=False, draw_dtype=torch.float64,
        proj_type="std",
    ):  # fmt: skip
        self.weights = {name: w.detach().clone().double() for name, w in weights.items()}
        self.ranks, self.lr, self.betas, self.eps, self.weight_decay = ranks, lr, betas, eps, weight_decay
        self.scale, self.scale_type, self.gap, self.seed = scale, scale_type, update_proj_gap, seed
        self.disable_nl, self.draw_dtype = disable_nl, draw_dtype
        self.kind = {"std": "gaussian", "rademacher": "rademacher"}[proj_type]
        self.t = dict.fromkeys(weights, 0)
        self.M, self.V, self.last = {}, {}, {}

    def step(self, grads: dict[str, Tensor | None]) -> None:
        """One step; a name whose gradient is missing or None is skipped."""
        for name, grad in grads.items():
            if grad is None:
                continue
            G, W = grad.double(), self.weights[name]
            self.t[name] += 1
            U = self._low_rank(name, G) if name in self.ranks else self._adam(name, G)
            t = self.t[name]
            W -= self.lr * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t) * U
            W -= self.lr * self.weight_decay * W

    def _moments(self, name: str, x: Tensor) -> Tensor:
        M = self.betas[0] * self.M.get(name, torch.zeros_like(x)) + (1 - self.betas[0]) * x
        V = self.betas[1] * self.V.get(name, torch.zeros_like(x)) + (1 - self.betas[1]) * x * x
        self.M[name], self.V[name] = M, V
        return M / (V.sqrt() + self.eps)

    def _adam(self, name: str, G: Tensor) -> Tensor:
        return self._moments(name, G)

    def _low_rank(self, name: str, G: Tensor) -> Tensor:
        if G.dim() == 3:
            return torch.stack(
                [self._matrix(f"{name}[{e}]", self.ranks[name], self.t[name], g) for e, g in enumerate(G)]
            )
        return self._matrix(name, self.ranks[name], self.t[name], G)

    def _matrix(self, name: str, r: int, t: int, G: Tensor) -> Tensor:
        m, n = G.shape
        refresh = (t - 1) // self.gap
        P = _projection(self.seed, name, refresh, r, min(m, n), self.draw_dtype, self.kind)
        R = G @ P.T if m >= n else P @ G
        N = self._moments(name, R)
        if self.scale_type == "tensor":
            U = N.norm() / (R.norm() + 1e-8) * G
        elif m >= n:
            U = (N.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None] * G
        else:
            U = (N.norm(dim=0) / (R.norm(dim=0) + 1e-8))[None, :] * G
        if not self.disable_nl:
            norm = U.norm()
            if self.last.get(name, 0.0) > 0:
                U = U / (max(norm / (self.last[name] + 1e-8), 1.01) / 1.01)
            # A norm of zero leaves the limiter as it was.
            if norm > 0:
                self.last[name] = U.norm()
        return math.sqrt(self.scale) * U
