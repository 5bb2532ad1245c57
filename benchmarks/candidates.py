"""What ``step_time.py`` measures: the LLaMA shapes, the optimizers, and the state that each should hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import apollo_dist

# hidden, ffn, layers and APOLLO's rank, as in the recipes (the paper's table of LLaMA sizes); tiny is the quickstart's.
RECIPES = {
    "tiny": (128, 344, 4, 32),
    "60M": (512, 1376, 8, 128),
    "130M": (768, 2048, 12, 192),
    "350M": (1024, 2736, 24, 256),
    "1B": (2048, 5461, 24, 256),
    "7B": (4096, 11008, 32, 256),
}
NEVER = 10**9  # an update_proj_gap that no benchmark reaches
COPY = "plain copies of the least bytes that APOLLO moves"


def matrix_shapes(recipe: str) -> list[tuple[int, int]]:
    """Shapes of the transformer blocks' matrices: per layer q, k, v, o (h, h), gate and up (ffn, h), down (h, ffn)."""
    hidden, ffn, layers, _ = RECIPES[recipe]
    return [*[(hidden, hidden)] * 4, (ffn, hidden), (ffn, hidden), (hidden, ffn)] * layers


@dataclass(frozen=True)
class Candidate:
    """One optimizer of the comparison.

    ``make(params, gap)`` builds it; ``gap`` is the steps between redraws of the projections, ignored by those without.
    ``formula(shapes, itemsize)`` is the number of bytes of state that it should hold; ``itemsize`` is that of a weight.
    """

    name: str
    make: Callable[[list[nn.Parameter], int], torch.optim.Optimizer]
    formula: Callable[[Sequence[tuple[int, int]], int], int] | None
    projected: bool = False


def _apollo(rank: int) -> Candidate:
    def make(params: list[nn.Parameter], gap: int) -> torch.optim.Optimizer:
        return apollo_dist.APOLLO([{"params": params, "rank": rank}], lr=1e-4, update_proj_gap=gap)

    return Candidate(f"APOLLO rank {rank}", make, lambda shapes, _: low_rank_bytes(shapes, rank), projected=True)


def _mini() -> Candidate:
    def make(params: list[nn.Parameter], gap: int) -> torch.optim.Optimizer:
        return apollo_dist.APOLLOMini([{"params": params, "rank": 1}], lr=1e-4, update_proj_gap=gap)

    return Candidate("APOLLO-Mini", make, lambda shapes, _: low_rank_bytes(shapes, 1), projected=True)


class _Products(torch.optim.Optimizer):
    """The matrix products that no implementation of APOLLO can do without, and nothing else: R = G P^T, in fp32."""

    def __init__(self, params: list[nn.Parameter], rank: int) -> None:
        super().__init__(params, {})
        self._columns = [torch.randn(rank, min(p.shape), dtype=torch.float32, device=p.device).t() for p in params]
        self._low_rank = [torch.empty(max(p.shape), rank, dtype=torch.float32, device=p.device) for p in params]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p, columns, out in zip(self.param_groups[0]["params"], self._columns, self._low_rank, strict=True):
            tall = p.shape[0] >= p.shape[1]
            torch.mm((p.grad if tall else p.grad.t()).float(), columns, out=out)


class _Copy(torch.optim.Optimizer):
    """Copies that move as many bytes as a step of APOLLO must: gradients twice, and weights in and out.

    The target is larger than caches are, so that it is written to memory.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        largest = max(p.numel() for p in params)
        self._target = torch.empty(max(1 << 27, largest), dtype=params[0].dtype, device=params[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        at = 0
        for p in self.param_groups[0]["params"]:
            for source in (p, p.grad):
                at = 0 if at + p.numel() > len(self._target) else at
                self._target[at : at + p.numel()].copy_(source.view(-1))
                at += p.numel()


def low_rank_bytes(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Two fp32 moments of ``rank`` numbers for each channel (index of the larger dimension), and one norm a matrix."""
    return sum(4 * (2 * max(m, n) * rank + 1) for m, n in shapes)


def _authors_package(rank: int, scale_type: str, scale: float, label: str) -> Candidate:
    """The authors' own package, called through its documented interface if the person running this installed it."""

    def make(params: list[nn.Parameter], gap: int) -> torch.optim.Optimizer:
        from apollo_torch import APOLLOAdamW  # type: ignore[import-not-found]

        group = {"params": params, "rank": rank, "proj": "random", "scale_type": scale_type, "scale": scale}
        optimizer: torch.optim.Optimizer = APOLLOAdamW([{**group, "update_proj_gap": gap, "proj_type": "std"}], lr=1e-4)
        return optimizer

    return Candidate(label, make, None, projected=True)


def candidates(rank: int) -> list[Candidate]:
    """Everything to compare at this rank; the first is what the others are measured against."""
    found = [
        Candidate(
            "AdamW (torch, fused)",
            lambda params, _: torch.optim.AdamW(params, lr=1e-4, fused=True),
            lambda shapes, size: sum(2 * m * n * size for m, n in shapes),
        ),
        Candidate("SGD (torch)", lambda params, _: torch.optim.SGD(params, lr=1e-4), lambda shapes, size: 0),
        _mini(),
        _apollo(rank),
        Candidate(
            f"matrix products of rank {rank}, nothing else",
            lambda params, _: _Products(params, rank),
            lambda shapes, size: 0,
        ),
    ]
    found.append(Candidate(COPY, lambda params, _: _Copy(params), lambda shapes, size: 0))
    if importlib.util.find_spec("apollo_torch") is not None:
        found.append(_authors_package(1, "tensor", 128.0, "apollo-torch Mini"))
        found.append(_authors_package(rank, "channel", 1.0, f"apollo-torch rank {rank}"))
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state held, as the optimizer counts them or, for torch's, summed over its tensors.

    One-element tensors (torch's step counters) are left out, as they are in the formulas.
    """
    if isinstance(optimizer, apollo_dist.APOLLO):
        return optimizer.state_bytes()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in tensors if value.numel() > 1)
