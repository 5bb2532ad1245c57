"""INT8 weights of torchao in tests: models whose gradients are chosen, and the codes that one process would have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from apollo_dist.kernels.rounding import key_of, random_bits

# Tall, wide, square, long rows: 2 and 3 ranks divide the rows evenly, as FSDP2 needs it.
SHAPES = ((24, 7), (6, 25), (12, 12), (6, 31))


class Line(nn.Module):
    """A layer through which the gradient that was asked for is its weight's, to the bit, and a norm weight."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False)
        self.norm = nn.Parameter(torch.ones(columns))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        weight, norm = self.linear.weight, self.norm
        unit = torch.eye(weight.shape[1], dtype=norm.dtype)
        product = (F.linear(unit, weight) * wanted["linear.weight"].t().to(norm.dtype)).sum()
        return product + (norm * wanted["norm"].to(norm.dtype)).sum()


class Lines(nn.Module):
    """Layers of ``SHAPES``."""

    def __init__(self, seed: int = 0, shapes: Iterable[tuple[int, int]] = SHAPES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Line(m, n) for m, n in shapes])

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            total = total + layer({k[len(prefix) :]: v for k, v in wanted.items() if k.startswith(prefix)})
        return total


def quantized(model: nn.Module) -> nn.Module:
    """``model`` with the weights of its linear layers in INT8, as a user makes them."""
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    quantize_(model, int8_weight_only_quantized_training())
    return model


def codes_and_scales(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The codes and scales of this rank's rows, by name; copies."""
    found = {}
    for name, p in model.named_parameters():
        local = p._local_tensor if isinstance(p, DTensor) else p
        if hasattr(local, "int_data"):
            found[name.removeprefix("module.")] = local.int_data.clone(), local.scale.clone()
    return found


def store(weights: dict[str, Tensor], names: Iterable[str], seed: int, step: int) -> dict[str, Tensor]:
    """Round weights of a reference to codes times scales, in place, in float64; the codes by name."""
    codes = {}
    for name in names:
        weight = weights[name]
        rows, columns = weight.shape
        bits = random_bits(key_of(seed, name), step, 0, rows, columns, columns)
        scale = weight.abs().max(dim=1).values / 127
        below = (weight / scale[:, None]).floor()
        up = (weight / scale[:, None] - below) * 65536 > bits + 0.5
        rounded = (below + up).clamp(-127, 127)
        codes[name] = rounded.to(torch.int8)
        weights[name] = rounded * scale[:, None]
    return codes
