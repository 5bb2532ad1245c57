"""Whole parameters: one process, DDP, DeepSpeed ZeRO-0. Every rank holds every matrix whole and repeats the work."""

from __future__ import annotations

from torch import Tensor

from .local_shard import WHOLE, Holding, whole_cover


def read(name: str, parameter: Tensor) -> Holding:
    """The holding of a plain parameter."""
    return Holding(
        name=name,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        device=parameter.device,
        layout="whole",
        group=WHOLE,
        cover=whole_cover(parameter.numel()),
        weight=parameter.detach,
        grad=lambda: parameter.grad,
    )
