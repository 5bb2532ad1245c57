"""A model whose gradients a test chooses, so that an engine's and the reference's are the same.

``loss = sum(parameter * wanted gradient)``: whatever an engine does to gradients (reduce, scatter, average, clip) is
done by the engine, and the reference gets what one process would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .versions import LOCAL

# (rows, columns): tall, wide, square, one row, fewer rows than ranks, odd sizes, one whose rows flat cuts cross, and
# one with fewer elements than ranks.
SHAPES = {
    "tall": (24, 7), "wide": (6, 25), "square": (9, 9), "row": (1, 11), "few": (3, 10), "odd": (13, 5), "long": (5, 31),
    "tiny": (2, 1),
}  # fmt: skip


def product(module: nn.Module, wanted: dict[str, Tensor]) -> Tensor:
    """The loss whose gradients were asked for, over the parameters that the module itself holds."""
    # By name: under FSDP1 what a module holds in its forward pass is no parameter.
    own = [(getattr(module, name), grad) for name, grad in wanted.items() if "." not in name]
    return sum((_inner(p, grad.to(p.dtype)) for p, grad in own), torch.zeros(()))


def _inner(p: Tensor, wanted: Tensor) -> Tensor:
    if isinstance(p, DTensor):  # divided by tensor parallelism
        wanted = distribute_tensor(wanted, p.device_mesh, p.placements, **LOCAL)
        return (p * wanted).sum().full_tensor()
    return (p * wanted).sum()


class Layer(nn.Linear):
    """A linear layer, called on its own, since ZeRO-3 gathers parameters module by module."""

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return product(self, wanted)


class Block(nn.Module):
    """One linear layer and a norm weight; its forward gives the loss whose gradients were asked for."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = Layer(columns, rows)
        self.norm = nn.Parameter(torch.ones(columns))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        inner = {name[7:]: grad for name, grad in wanted.items() if name.startswith("linear.")}
        return self.linear(inner) + product(self, wanted)


class Bag(nn.Module):
    """Blocks of every shape, an embedding, and a stack of experts."""

    def __init__(
        self, seed: int = 0, experts: bool = True, shapes: Iterable[tuple[int, int]] = SHAPES.values()
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = Block(17, 4)
        self.layers = nn.ModuleList([Block(m, n) for m, n in shapes])
        if experts:
            self.layers.append(Experts())

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        total = 0.0
        for prefix, module in [("embed", self.embed), *((f"layers.{i}", b) for i, b in enumerate(self.layers))]:
            inner = {k[len(prefix) + 1 :]: v for k, v in wanted.items() if k.startswith(prefix + ".")}
            total = total + module(inner)
        return total


class Experts(nn.Module):
    """A 3-D weight: three expert matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5) / 3)

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return product(self, wanted)


def low_rank(model: nn.Module, rank: int) -> dict[str, int]:
    """The low-rank matrices of a ``Bag`` and their ranks; one row allows rank 1 only."""
    ranks = {}
    for name, p in model.named_parameters():
        shape = getattr(p, "ds_shape", p.shape)
        if name.startswith("layers.") and len(shape) > 1:
            ranks[name] = min(rank, *shape[-2:])
    return ranks


def groups_of(model: nn.Module, ranks: dict[str, int]) -> list[dict]:
    """Parameter groups for ``APOLLO``, one for each rank, with names."""
    groups: dict[int | None, list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
            groups.setdefault(ranks.get(plain), []).append((name, p))
    return [{"params": params, "rank": rank} for rank, params in groups.items()]


def gradients(shapes: dict[str, torch.Size], step: int, rank: int, dtype=torch.float64) -> dict[str, Tensor]:
    """The gradients that ``rank`` contributes at a step: of varying size, so that the limiter acts, and uneven."""
    generator = torch.Generator().manual_seed(7919 * step + 13 * rank + 1)
    size = 10.0 ** (step % 3)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * size
        for name, shape in shapes.items()
    }


def mean_gradients(shapes: dict[str, torch.Size], step: int, world: int, dtype=torch.float64) -> dict[str, Tensor]:
    """What the engine's average over ranks makes of them."""
    each = [gradients(shapes, step, rank, dtype) for rank in range(world)]
    return {name: sum(g[name].double() for g in each) / world for name in shapes}


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Names and logical shapes of the trainable parameters."""
    return {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters() if p.requires_grad}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def llama_7b_shapes() -> dict[str, tuple[int, int]]:
    """Of LLaMA-7B's attention and MLP matrices, by name."""
    shapes = {}
    for i in range(32):
        for name in ("q", "k", "v", "o"):
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (4096, 4096)
        for name, shape in {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}.items():
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    return shapes
