"""Initial weights: each element is a function of (seed, name, index), so any rank generates any part of them alone.

The distribution is the one that ``transformers`` gives a LLaMA: normals of standard deviation ``init_std`` in linear
layers and embeddings, ones in norms, zeros in biases. The random words are Philox's, the normals Box and Muller's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apollo_dist.kernels.philox import MASK32, philox_4x32_10, words_of

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config

# Elements that are generated together, from a quarter as many counters. Blocks begin at multiples of it, so an element
# has the same place in the same kernel call whoever generates it: libraries of vector functions round the last bit
# differently at the end of an array. On CPUs a block's temporaries stay in the cache, and no kernel splits them among
# threads, which moves ends as well.
BLOCK = 1 << 17


class InitialWeights:
    """The initial values of a model's parameters.

    Args:
        model: on any device, before an engine wraps it; only names, shapes and kinds of modules are read.
        seed: of the run.
        std: standard deviation of the normals.

    Raises:
        ValueError: for a parameter of a module whose initial values are not known.
    """

    def __init__(self, model: nn.Module, seed: int, std: float) -> None:
        self._seed, self._std = seed, std
        self._constants: dict[str, float | None] = {}  # None: normals
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter, module in named_parameters_and_modules(model):
            self._constants[name] = _constant(name, module)
            self.shapes[name] = tuple(parameter.shape)

    @classmethod
    def of(cls, config: Config, model: nn.Module) -> InitialWeights:
        """Those of a run."""
        return cls(model, config.seed, config.model.init_std)

    @torch.no_grad()
    def fill(self, name: str, part: Tensor, start: int = 0) -> None:
        """Fill ``part`` with the elements of a parameter from ``start`` on, in row-major order.

        Args:
            name: of the parameter, without what engines put before it.
            part: contiguous, of any shape, dtype and device; values are rounded to fp32 first, so that bf16 has the
                values of an fp32 model that is rounded.
            start: index of its first element in the flat parameter.
        """
        flat, numel = part.view(-1), math.prod(self.shapes[name])
        if start + flat.numel() > numel:
            raise ValueError(f"{name} has {numel} elements, and {start} to {start + flat.numel()} are asked for")
        constant = self._constants[name]
        if constant is not None:
            flat.fill_(constant)
            return
        words = words_of(f"apollo_dist initial weights\0{self._seed}\0{name}")
        stop = start + flat.numel()
        for first in range(start - start % BLOCK, stop, BLOCK):
            low, high = max(first, start), min(first + BLOCK, stop)
            block = _normals(words, first, min(BLOCK, numel - first), part.device)
            flat[low - start : high - start] = block[low - first : high - first].mul_(self._std).to(torch.float32)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of what this machine generates: of the first block of the largest parameter."""
        name = max(self.shapes, key=lambda key: math.prod(self.shapes[key]))
        block = torch.empty(min(BLOCK, math.prod(self.shapes[name])))
        self.fill(name, block)
        return hashlib.sha256(block.view(torch.int32).numpy().tobytes()).hexdigest()[:16]


def _normals(words: tuple[int, int, int, int], first: int, count: int, device: torch.device) -> Tensor:
    """``count`` standard normals in float64 from element ``first``, a multiple of 4, on.

    Four elements come from one call of Philox: the counter is the index of the four, in two words, beside two words
    that stand for the parameter; the other two are the key.
    """
    quads = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    k0, k1, c2, c3 = torch.tensor(words, device=device)[:, None].unbind()
    random = philox_4x32_10((quads & MASK32, quads >> 32, c2, c3), (k0, k1))
    normals = torch.empty((len(quads), 4), dtype=torch.float64, device=device)
    for pair in (0, 2):
        # 32 bits each, in (0, 1] for the radius (the logarithm never sees 0) and in [0, 1) turns for the angle.
        radius = (random[pair] + 1).to(torch.float64).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = random[pair + 1].to(torch.float64).mul_(2.0**-32 * 2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=normals[:, pair])
        torch.mul(radius, angle.sin_(), out=normals[:, pair + 1])
    return normals.view(-1)[:count]


def named_parameters_and_modules(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each parameter with its full name and the module that has it."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, parameter, module


def _constant(name: str, module: nn.Module) -> float | None:
    kind, last = type(module).__name__, name.rpartition(".")[2]
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return 0.0 if last == "bias" else None
    if kind.endswith("RMSNorm") and last == "weight":
        return 1.0
    raise ValueError(f"no initial values are known for {name} of a {kind}: pretrain/initial.py has to say them")
