"""Holdings inside the flat tensors that DeepSpeed gives to ``step()``; shared by the stages."""

from __future__ import annotations

import torch
from torch import Tensor

from .local_shard import Holding, ShardGroup, whole_cover
from .regions import FlatCover, Range


def flat_holding(
    name: str, shape: tuple[int, ...], flat: Tensor, at: int, group: ShardGroup, ranges: tuple[Range, ...]
) -> Holding:
    """A parameter of which this rank's range lies in ``flat`` from position ``at`` on.

    The tensor is read at every step: under NVMe offload its memory comes and goes.

    Args:
        name, shape: of the parameter.
        flat: fp32 weights of this rank, 1-D; its ``.grad`` has the same order.
        at: where the range starts in ``flat``.
        group: the ranks that divide the parameter.
        ranges: for each of them its range of the parameter's elements.
    """
    start, stop = ranges[group.rank]
    end = at + stop - start

    def grad() -> Tensor | None:
        return None if flat.grad is None else flat.grad.view(-1)[at:end]

    return Holding(
        name=name,
        shape=shape,
        dtype=flat.dtype,
        device=flat.device,
        layout="zero",
        group=group,
        cover=FlatCover(ranges) if group.size > 1 else whole_cover(stop - start),
        weight=lambda: flat.detach().view(-1)[at:end],
        grad=grad,
    )


def check_first_use(holding: Holding, model: Tensor) -> None:
    """The flat must hold what the model does, or the offsets are wrong.

    Args:
        holding: made by ``flat_holding``.
        model: the same elements as the model holds them, 1-D, in its precision.

    Raises:
        ValueError: if they differ.
    """
    ours = holding.weight().to(model.dtype)
    if not torch.equal(ours, model.detach().to(ours.device)):
        raise ValueError(
            f"{holding.name}: DeepSpeed's flat buffer does not hold the parameter's values at the expected place; "
            "this layout cannot be read (was the model changed outside of the engine?)"
        )
