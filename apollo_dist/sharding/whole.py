"""Whole parameters: one process, DDP, DeepSpeed ZeRO-0. Every rank holds every matrix whole and repeats the work."""

from __future__ import annotations

from torch import Tensor

from .int8 import rows_of
from .local_shard import WHOLE, LocalShard
from .regions import whole_partition


def read(name: str, parameter: Tensor, of: Tensor | None = None) -> LocalShard:
    """The shard of a plain parameter, or of a clone ``of`` one, which then says whether it is frozen."""
    model = parameter if of is None else of
    return LocalShard(
        name=name,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        device=parameter.device,
        layout="whole",
        group=WHOLE,
        partition=whole_partition(parameter.numel()),
        weight=parameter.detach,
        grad=lambda: parameter.grad if model.requires_grad else None,
        rows=rows_of(name, parameter),
    )
