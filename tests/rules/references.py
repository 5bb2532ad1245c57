"""SCALE, Adam-mini, GaLore, Fira, SGD and AdamW, dense, slow, in float64, from the equations.

Nothing here is the package's but the random numbers of projections, which are a matter of definition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apollo_dist.kernels.philox import words_of
from apollo_dist.projections.gaussian import gaussian


def singular_directions(G: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the smaller side as rows, each with its largest entry positive."""
    m, n = G.shape
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    P = Vh[:rank] if m >= n else U[:, :rank].T
    return with_signs(P)


def with_signs(P: Tensor) -> Tensor:
    """P with the largest entry of each row positive."""
    return P * torch.gather(P, 1, P.abs().argmax(dim=1, keepdim=True)).sign()


class Dense:
    """One process with whole parameters.

    Args:
        weights: name -> tensor; copied to float64.
        forms: name -> (kind, options): "rows", "columns" or "adam" of SCALE ("rows" with a momentum); "blocks" (of so
            many elements) or "bias" of Adam-mini, with the weight decay; "low_rank" of GaLore, Fira and APOLLO; "muon";
            "sgd"; "adamw".
        draw_dtype: what random projections are generated in (the dtype of the run that is judged).
    """

    def __init__(
        self, weights, forms, *, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, draw_dtype=torch.float64
    ):  # fmt: skip
        self.draw_dtype = draw_dtype
        self.weights = {name: w.detach().clone().double() for name, w in weights.items()}
        self.forms, self.lr, self.decay, self.betas, self.eps = forms, lr, weight_decay, betas, eps
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
        self.t, self.steps = dict.fromkeys(weights, 0), 0

    def step(self, grads: dict[str, Tensor | None]) -> None:
        self.steps += 1
        for name, grad in grads.items():
            if grad is not None:
                self.t[name] += 1
                kind, options = self.forms[name]
                update = getattr(self, f"_{kind}")
                if kind == "low_rank":
                    options = {**options, "name": name}
                update(self.weights[name], grad.double(), self.state[name], self.t[name], **options)

    def _rows(self, W, G, state, t, momentum=0.0, dim=-1):
        X = G
        if momentum:
            X = state["B"] = momentum * state.get("B", torch.zeros_like(G)) + (1 - momentum) * G
        rms = X.square().mean(dim=dim, keepdim=True).sqrt()
        W *= 1 - self.lr * self.decay
        W -= self.lr * X / rms.clamp_min(1e-8)

    def _columns(self, W, G, state, t, momentum=0.0):
        self._rows(W, G, state, t, momentum, dim=-2)

    def _moments(self, G, state):
        one, two = self.betas
        M = state["M"] = one * state.get("M", torch.zeros_like(G)) + (1 - one) * G
        V = state["V"] = two * state.get("V", torch.zeros_like(G)) + (1 - two) * G * G
        return M, V

    def _adam(self, W, G, state, t, ratio=1.0):
        M, V = self._moments(G, state)
        lr = self.lr * ratio
        W *= 1 - lr * self.decay
        W -= lr * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t) * M / (V.sqrt() + self.eps)

    def _adamw(self, W, G, state, t, decay=None):
        M, V = self._moments(G, state)
        W *= 1 - self.lr * (self.decay if decay is None else decay)
        W -= self.lr / (1 - self.betas[0] ** t) * M / ((V / (1 - self.betas[1] ** t)).sqrt() + self.eps)

    def _blocks(self, W, G, state, t, elements, decay=None):
        one, two = self.betas
        M = state["M"] = one * state.get("M", torch.zeros_like(G)) + (1 - one) * G
        blocks = G.reshape(-1, elements)
        v = state["v"] = two * state.get("v", 0.0) + (1 - two) * blocks.square().mean(dim=1)
        W *= 1 - self.lr * (self.decay if decay is None else decay)
        scale = 1 / ((v / (1 - two**t)).sqrt() + self.eps)
        W -= self.lr / (1 - one**t) * (M.reshape(-1, elements) * scale[:, None]).reshape(W.shape)

    def _low_rank(self, W, G, state, t, name, rank, gap, rule="GaLore", alpha=1.0, svd=False, rounded=False):
        """By ``svd`` P is made anew in the first of each ``gap`` steps, perhaps ``rounded``; "subspace" is spread."""
        each = [(name, W, G)]
        if W.dim() == 3:
            each = [(f"{name}[{e}]", w, g) for e, (w, g) in enumerate(zip(W, G, strict=True))]
        for key, w, g in each:
            own = state.setdefault(key, {})
            m, n = g.shape
            shift = words_of(f"apollo_dist refresh\0{key}")[0] % gap if svd == "subspace" else 0
            if svd and (self.steps == 1 or (self.steps - 1) % gap == shift):
                own["P"] = singular_directions(g, rank) if svd is True else self._subspace(key, g, rank)
                own["P"] = own["P"].bfloat16().double() if rounded else own["P"]
            elif not svd and (t - 1) % gap == 0:
                own["P"] = self._projection(key, rank, min(m, n), (t - 1) // gap)
            P, X = own["P"], g if m >= n else g.T
            R = X @ P.T
            M, V = self._moments(R, own)
            N = M / (V.sqrt() + 1e-6)
            U = alpha * N @ P
            if rule != "GaLore":
                phi = N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8)
                S = phi * (X - alpha * R @ P) if rule == "Fira" else phi * X
                if own.get("last", 0.0) > 0:
                    S = S / (max(S.norm() / (own["last"] + 1e-8), 1.01) / 1.01)
                if S.norm() > 0:
                    own["last"] = S.norm()
                U = U + S if rule == "Fira" else S
            w -= self.lr * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t) * (U if m >= n else U.T)
        W -= self.lr * self.decay * W

    def _subspace(self, name, G, rank):
        X = G if G.shape[0] >= G.shape[1] else G.T
        inner = X.shape[1]
        Q = torch.linalg.qr(gaussian(0, name, self.steps, min(rank + 8, inner), inner, dtype=torch.float64).T)[0]
        for _ in range(2):
            Q = torch.linalg.qr(X.T @ (X @ Q))[0]
        _, _, Vh = torch.linalg.svd(X @ Q, full_matrices=False)
        return with_signs((Q @ Vh.T)[:, :rank].T)

    def _projection(self, name, rank, size, refresh):
        return gaussian(0, name, refresh, rank, size, dtype=self.draw_dtype).double()

    def _muon(self, W, G, state, t, momentum=0.95, nesterov=True, adjust="original", blocks=None, rounded=False):
        """By ``blocks`` of so many rows; ``rounded`` to bfloat16 before and after the iterations."""
        B = state["B"] = momentum * state.get("B", torch.zeros_like(G)) + (1 - momentum) * G
        X = (1 - momentum) * G + momentum * B if nesterov else B
        W *= 1 - self.lr * self.decay
        X = X.bfloat16().double() if rounded else X
        for w, x in zip(W, X, strict=True) if W.dim() == 3 else [(W, X)]:
            for each in zip(*(torch.split(full, blocks or [len(full)]) for full in (w, x)), strict=True):
                self._orthogonalized(*each, adjust, rounded)

    def _orthogonalized(self, w, x, adjust, rounded):
        m, n = x.shape
        x = x.T if m > n else x
        x = x / max(float(x.norm()), 1e-7)
        for _ in range(5):
            A = x @ x.T
            x = 3.4445 * x + (-4.775 * A + 2.0315 * A @ A) @ x
        x = x.bfloat16().double() if rounded else x
        rho = math.sqrt(max(1, m / n)) if adjust == "original" else 0.2 * math.sqrt(max(m, n))
        w -= self.lr * rho * (x.T if m > n else x)

    def _hf_adamw(self, W, G, state, t):
        M, V = self._moments(G, state)
        W -= self.lr * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t) * M / (V.sqrt() + 1e-6)
        W -= self.lr * self.decay * W

    def _sgd(self, W, G, state, t, momentum=0.0, dampening=0.0, nesterov=False):
        G = G + self.decay * W
        if momentum:
            B = state["B"] = G if t == 1 else momentum * state["B"] + (1 - dampening) * G
            G = G + momentum * B if nesterov else B
        W -= self.lr * G
