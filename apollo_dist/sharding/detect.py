"""Pick the layout of every tensor that a step is given, or say why none fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from . import dtensor, fsdp1, whole
from .deepspeed import zero

if TYPE_CHECKING:
    from .local_shard import LocalShard


def read(tensors: Sequence[Tensor], name_of: zero.Name, engine: zero.Engine) -> list[LocalShard]:
    """What this rank holds of the parameters in ``tensors`` (one parameter group's ``params``), in order.

    Args:
        tensors: parameters, DTensors, or the tensors that DeepSpeed put in their place.
        name_of: the canonical name of a parameter of the model.
        engine: DeepSpeed's part in this step.

    Raises:
        ValueError: if the layout of a tensor cannot be read; the message says what to do.
    """
    shards: list[LocalShard] = []
    for tensor in tensors:
        found = None if engine.wrapper is None else zero.read(engine.wrapper, tensor, name_of)
        shards += [_plain(tensor, name_of(tensor))] if found is None else found
    return shards


def make_groups(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Make the process groups that ``read`` needs and that do not exist yet. A collective of ``group``.

    Args:
        tensors: what ``read`` will be asked for, of any layout.
        group: the ranks that train them, default all.

    Raises:
        ValueError: on all ranks alike, if ranks that share a parameter do not all hold it.
    """
    dtensor.make_groups(tensors, group)


def _plain(tensor: Tensor, name: str) -> LocalShard:
    if tensor.grad is not None and tensor.grad.is_sparse:
        raise ValueError(
            f"{name} has a sparse gradient, which APOLLO does not support; use sparse=False in nn.Embedding"
        )
    if dtensor.is_dtensor(tensor):
        return dtensor.read(name, tensor)  # type: ignore[arg-type]
    if fsdp1.is_flattened(tensor):
        return fsdp1.read(name, tensor)
    if hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name} is divided by ZeRO-3, but step() was not called by DeepSpeed's engine; call engine.step()"
        )
    return whole.read(name, tensor)


def reshard(model: nn.Module) -> None:
    """Make the parameters of FSDP modules the sharded ones, and drop gathered copies of them."""
    dtensor.reshard(model)
    fsdp1.reshard(model)
