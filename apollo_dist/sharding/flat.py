"""Local shards inside the flat tensors that DeepSpeed gives to ``step()``; shared by the stages."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from .local_shard import LocalShard, ShardGroup
from .regions import FlatPartition, Range, whole_partition

logger = logging.getLogger("apollo_dist")


def flat_shard(
    name: str,
    shape: tuple[int, ...],
    parameter: Tensor,
    flat: Tensor,
    at: int,
    group: ShardGroup,
    ranges: tuple[Range, ...],
) -> LocalShard:
    """A parameter of which this rank's range lies in ``flat`` from position ``at`` on.

    The tensor is read at every step: under NVMe offload its memory comes and goes.

    Args:
        name, shape: of the parameter.
        parameter: the model's, which says whether it is frozen: in ``flat`` a missing gradient is zero.
        flat: fp32 weights of this rank, 1-D; its ``.grad`` has the same order.
        at: where the range starts in ``flat``.
        group: the ranks that divide the parameter.
        ranges: for each of them its range of the parameter's elements.
    """
    start, stop = ranges[group.rank]
    end = at + stop - start

    def grad() -> Tensor | None:
        return None if flat.grad is None or not parameter.requires_grad else flat.grad.view(-1)[at:end]

    return LocalShard(
        name=name,
        shape=shape,
        dtype=flat.dtype,
        device=flat.device,
        layout="zero",
        group=group,
        partition=FlatPartition(ranges) if group.size > 1 else whole_partition(stop - start),
        weight=lambda: flat.detach().view(-1)[at:end],
        grad=grad,
    )


def tell_other_weights(pairs: Iterable[tuple[LocalShard, Tensor]]) -> None:
    """Log which fp32 weights are not those of the model, once they are read for the first time.

    DeepSpeed trains the fp32 weights and gives them to the model after a step. They differ before the first one where
    somebody set them (``safe_set_full_fp32_param``, a checkpoint with more precision than the model), but also where
    somebody loaded weights into the model after ``deepspeed.initialize``, which are then lost.

    Args:
        pairs: shards made by ``flat_shard``, each with the same elements as the model holds them, 1-D, in its
            precision.
    """
    other = [h.name for h, model in pairs if not torch.equal(h.weight().to(model), model.detach())]
    if other:
        logger.warning(
            "the fp32 weights of %d parameters, such as %s, are not those of the model rounded: DeepSpeed trains the "
            "fp32 weights. Right after safe_set_full_fp32_param; weights that were loaded into the model after "
            "deepspeed.initialize are lost",
            len(other),
            other[0],
        )
