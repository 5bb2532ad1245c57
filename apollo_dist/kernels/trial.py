"""Whether Triton's kernels work on a device: each is run once there, on small tensors, beside torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference
from .parts import AdamWPart, ApplyPart, ProjectPart, RowsPart
from .quantizer import quantize
from .rounding import Rounding

# Relative to the largest result, by its dtype: sums are taken in another order, and what is rounded to 16 bits may
# become the neighbour. What is generated is the same to the bit.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}
EXACT = ("draw", "rounding", "apply_rows")
BETAS, EPS = (0.9, 0.999), 1e-6
CHANNELS, INNER, RANK = 67, 96, 5  # no multiples of a block; read in vectors, as in most models
LARGE = 136, 256  # channels and rank of which a tile takes most registers and shared memory

# Runs one kernel, of either kind, on the same inputs, and returns what it wrote.
Trial = Callable[[Any], tuple[Tensor, ...]]


def failure(device: torch.device) -> str | None:
    """Why Triton's kernels cannot be used on a device; None if they can. Waits for the device.

    Args:
        device: a CUDA device, or the CPU for Triton's interpreter.
    """
    try:
        from . import triton

        for name, trial in _trials(device):
            for got, expected in zip(trial(triton), trial(reference), strict=True):
                error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
                if not float(error) <= (0.0 if name in EXACT else TOLERANCE[got.dtype]):
                    return f"{name} differs from torch's operations by {float(error):.1e}"
    except Exception as error:  # compilers and drivers raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _trials(device: torch.device) -> Iterator[tuple[str, Trial]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys = torch.tensor([[5, 6, 7, 8, 0], [2**32 - 1, 2**31, 1, 2, 40]], device=device)
    table = normal(1 << 16, dtype=torch.bfloat16)
    columns, coefficients = normal(INNER, RANK, dtype=torch.bfloat16), normal(1, 2)
    low_rank, first, second = normal(CHANNELS, RANK), normal(CHANNELS, RANK), normal(CHANNELS, RANK).square()

    def draw(kernels: Any) -> tuple[Tensor, ...]:
        slabs = torch.empty((2, RANK, INNER), dtype=torch.bfloat16, device=device)
        signs = torch.empty_like(slabs)
        kernels.draw(keys, table, slabs)
        kernels.draw_signs(keys, signs)
        return slabs, signs

    yield "draw", draw

    def moments(kernels: Any) -> tuple[Tensor, ...]:
        results = first.clone(), second.clone(), normal(CHANNELS), normal(CHANNELS)
        kernels.moments(results[0], results[1], low_rank, results[2], results[3], betas=BETAS, eps=EPS)
        return results

    yield "moments", moments

    def add_up(kernels: Any) -> tuple[Tensor, ...]:
        out = torch.empty(RANK * CHANNELS, device=device)
        kernels.add_up(torch.stack([low_rank, first, second]).view(3, -1), out)
        return (out,)

    yield "add_up", add_up
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        grad, weight, scale = normal(CHANNELS, INNER, dtype=dtype), normal(CHANNELS, INNER, dtype=dtype), first[:, 0]

        def project(kernels: Any, grad: Tensor = grad) -> tuple[Tensor, ...]:
            out, squares = torch.empty_like(low_rank), torch.empty(CHANNELS, device=device)
            kernels.project([ProjectPart(grad, columns, 0)], 0.5, out, squares)
            return out, squares

        def apply(kernels: Any, grad: Tensor = grad, weight: Tensor = weight, scale: Tensor = scale) -> tuple[Tensor]:
            changed = weight.clone()
            kernels.apply([ApplyPart(changed, grad, scale.contiguous(), 0)], coefficients)
            return (changed,)

        def adamw(kernels: Any, grad: Tensor = grad, weight: Tensor = weight) -> tuple[Tensor, ...]:
            shown = weight.flatten().clone(), torch.zeros_like(grad.flatten(), dtype=torch.float32)
            part = AdamWPart(shown[0], grad.flatten(), shown[1], torch.zeros_like(shown[1]))
            kernels.adamw([part], coefficients[0], betas=BETAS, eps=EPS)
            return *shown, part.exp_avg_sq

        yield from ((f"{run.__name__} in {dtype}", run) for run in (project, apply, adamw))

    large = normal(INNER, LARGE[0], dtype=torch.bfloat16), normal(LARGE[1], INNER, dtype=torch.bfloat16)
    yield "project of a large rank", _large_trial(*large)
    yield from _rounding_trials(normal(CHANNELS, INNER, dtype=torch.bfloat16), normal(CHANNELS, INNER), coefficients)


def _large_trial(grad: Tensor, projection: Tensor) -> Trial:
    """Of a gradient (inner extent, channels) and P, (r, inner extent)."""

    def project(kernels: Any) -> tuple[Tensor, ...]:
        out = torch.empty((grad.shape[1], len(projection)), device=grad.device)
        squares = torch.empty(grad.shape[1], device=grad.device)
        kernels.project([ProjectPart(grad.t(), projection.t(), 0)], 0.5, out, squares)
        return out, squares

    return project


def _rounding_trials(stored: Tensor, added: Tensor, coefficients: Tensor) -> Iterator[tuple[str, Trial]]:
    """Of weights ``stored`` in bf16, with what is ``added``."""
    key = 1, 2, 3

    def rounding(kernels: Any) -> tuple[Tensor, ...]:
        """Of a matrix whose rows begin with a call of Philox, and of one whose rows do not."""
        found = [stored.clone() for _ in range(3)]
        hows = [Rounding(key, 4, 8, (96, 1)), Rounding(key, 4, 3, (93, 1)), Rounding(key, 4, 0, (1, 104))]
        parts = [ApplyPart(out, added, None, 0, how) for out, how in zip(found, hows, strict=True)]
        kernels.apply(parts, coefficients)
        return tuple(found)

    yield "rounding", rounding

    def rounded_adamw(kernels: Any) -> tuple[Tensor, ...]:
        weight, m, v = (stored.flatten().abs() for _ in range(3))
        how = Rounding(key, 4, 0, (INNER, 1))
        part = AdamWPart(weight, added.flatten(), m, v, INNER, how, (how, how))
        kernels.adamw([part], coefficients[0], betas=BETAS, eps=EPS)
        return weight, m, v

    yield "rounded adamw", rounded_adamw

    def apply_rows(kernels: Any) -> tuple[Tensor, ...]:
        codes, scales = quantize(stored.float(), torch.bfloat16)
        how = Rounding(key, 4, 0, (INNER, 1))
        kernels.apply_rows([RowsPart(codes, scales, stored, added[:, 0].abs(), 1, 0, how)], coefficients)
        return codes, scales

    yield "apply_rows", apply_rows
