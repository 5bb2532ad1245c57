"""SCALE, Adam-mini, SGD and AdamW, dense, slow, in float64, from the equations; nothing here is the package's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Dense:
    """One process with whole parameters.

    Args:
        weights: name -> tensor; copied to float64.
        forms: name -> (kind, options): "rows", "columns" or "adam" of SCALE ("rows" with a momentum); "blocks" (of so
            many elements) or "bias" of Adam-mini, with the weight decay; "sgd"; "adamw".
    """

    def __init__(self, weights, forms, *, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
        self.weights = {name: w.detach().clone().double() for name, w in weights.items()}
        self.forms, self.lr, self.decay, self.betas, self.eps = forms, lr, weight_decay, betas, eps
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
        self.t = dict.fromkeys(weights, 0)

    def step(self, grads: dict[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            if grad is not None:
                self.t[name] += 1
                kind, options = self.forms[name]
                update = getattr(self, f"_{kind}")
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

    def _sgd(self, W, G, state, t, momentum=0.0, dampening=0.0, nesterov=False):
        G = G + self.decay * W
        if momentum:
            B = state["B"] = G if t == 1 else momentum * state["B"] + (1 - dampening) * G
            G = G + momentum * B if nesterov else B
        W -= self.lr * G
