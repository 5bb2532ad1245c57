"""INT8 weights of torchao (``torchao.prototype.quantized_training``): where their codes and scales are.

``quantize_(model, int8_weight_only_quantized_training())`` makes the weight of each ``nn.Linear`` an
``Int8QuantizedTrainingLinearWeight``, through which forward and backward pass go; its gradient is an ordinary tensor.
FSDP2 shards it by rows, and gathers codes and scales. torchao is looked at only if something else has imported it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..weights.int8 import CLASS, Int8Rows, is_int8, local_of
from .internals import require


def check(name: str, parameter: Tensor) -> None:
    """Refuse what is no weight that a step can write; local, and the same on every rank.

    Raises:
        ValueError: for torchao's other tensors, and for INT8 weights that are not sharded by whole rows alike.
    """
    local = local_of(parameter)
    kind = type(local)
    if not is_int8(local):
        if kind.__module__.partition(".")[0] == "torchao":
            raise ValueError(
                f"{name} is stored as torchao's {kind.__name__}, which no step here can write. Of torchao's weights "
                f"{CLASS} can be trained: quantize_(model, int8_weight_only_quantized_training())"
            )
        return
    require(local, "int_data", "scale")
    if not isinstance(parameter, DTensor):
        return
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [(axis, p) for axis, p in enumerate(placements) if type(p) is not Replicate and mesh.size(axis) > 1]
    if len(sharded) > 1 or any(type(p) is not Shard or p.dim != 0 for _, p in sharded):
        raise ValueError(
            f"{name} is INT8 with one scale a row, and its placements {placements} cut rows or shard it over several "
            "mesh axes: shard it by fully_shard on dim 0, without tensor parallelism"
        )
    if not sharded and any(type(p) is not Replicate for p in placements):
        raise ValueError(
            f"{name} is INT8, and FSDP2 on one rank does not gather, so torch's forward pass fails with such weights: "
            "leave the model as it is, without fully_shard"
        )
    ranks = mesh.size(sharded[0][0]) if sharded else 1
    if parameter.shape[0] % ranks:
        raise ValueError(
            f"{name} is INT8 and has {parameter.shape[0]} rows on {ranks} ranks: FSDP2 cannot gather torchao's weights "
            "unless every rank has as many rows. Take a number of ranks that divides them, or leave it in bf16"
        )


def rows_of(name: str, parameter: Tensor, first: int = 0) -> Int8Rows | None:
    """The rows of an INT8 weight that this rank holds; None for other parameters.

    Args:
        name: canonical name.
        parameter: whole or a DTensor that ``check`` has seen.
        first: the index of the first element here in the whole matrix.
    """
    local = local_of(parameter)
    if not is_int8(local):
        return None
    check(name, parameter)
    rows, columns = local.shape
    return Int8Rows(_stored(parameter), name, (rows, columns), first)


def _stored(parameter: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def stored() -> tuple[Tensor, Tensor]:
        local: Any = local_of(parameter)
        return local.int_data, local.scale

    return stored
