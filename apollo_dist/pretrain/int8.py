"""``--weights int8``: the linear layers of the transformer blocks in INT8, as torchao stores them.

Embedding, head and norms stay as they are. Initial weights are made in floating point, some rows at a time, and rounded
to nearest, so that no rank holds more than its own part of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apollo_dist.integrations.extras import not_installed
from apollo_dist.kernels.quantizer import quantize
from apollo_dist.pretrain.optimizer_config import AdamWConfig, JsonOptimizer
from apollo_dist.weights.int8 import holds_int8, local_of

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.initial import InitialWeights

# How many elements are made in floating point at a time.
_ELEMENTS = 1 << 22


def check_int8(config: Config, world: int) -> None:
    """Raise ValueError for what cannot be trained in INT8, before anything is built.

    Args:
        config: of the run.
        world: its ranks.
    """
    if config.weights is None:
        return
    absent = not_installed("torchao")
    if absent:
        raise ValueError(f"--weights int8: {absent}")
    if config.engine == "deepspeed":
        raise ValueError(
            "--weights int8 with --engine deepspeed: DeepSpeed keeps fp32 masters of what it trains, so INT8 would "
            "save nothing; take ddp or fsdp2"
        )
    if config.engine == "fsdp1":
        raise ValueError(
            "--weights int8 with --engine fsdp1: it makes one tensor of the weights of a layer, which INT8 weights "
            "with their scales cannot be; take fsdp2"
        )
    if config.precision == "bf16":
        raise ValueError(
            "--weights int8 with --precision bf16: there are no fp32 weights from which those in bf16 could be made; "
            "take bf16-pure, or fp32"
        )
    if type(config.optimizer) in (AdamWConfig, JsonOptimizer):  # not this library's
        raise ValueError(
            f"--weights int8 is for this library's optimizers: {config.optimizer.name} would round weights at random "
            "on each rank alone, and the replicas would drift apart"
        )
    if config.engine == "fsdp2":
        _check_rows(config, world)


def _check_rows(config: Config, world: int) -> None:
    if world == 1:
        raise ValueError(
            "--weights int8 with --engine fsdp2 on one rank: take --engine ddp, which shards nothing either"
        )
    model = config.model
    kv = model.hidden_size // model.num_heads * model.kv_heads
    for key, rows in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size), ("kv", kv)):
        if rows % world:
            raise ValueError(
                f"--weights int8 with --engine fsdp2: {rows} rows ({key}) do not divide by {world} ranks, and "
                "torchao's weights cannot be gathered then; take a number of ranks that divides them"
            )


def quantize_layers(layers: list[nn.Module]) -> None:
    """Make the weights of linear layers INT8: on the device where they are, without values.

    Args:
        layers: modules whose ``nn.Linear`` are meant.
    """
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                empty = empty_int8((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
                module.weight = nn.Parameter(empty, requires_grad=weight.requires_grad)


def empty_int8(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An INT8 weight without values: (rows, n), with scales in ``dtype``."""
    from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight

    codes = torch.empty(shape, dtype=torch.int8, device=device)
    made: Tensor = Int8QuantizedTrainingLinearWeight(codes, torch.empty(shape[0], dtype=dtype, device=device))
    return made


def empty_like(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for what this rank holds of a parameter, whole or a DTensor; INT8 where it is."""
    local = local_of(parameter)
    if holds_int8(parameter):
        return empty_int8((local.shape[0], local.shape[1]), dtype, device)
    return torch.empty(local.shape, dtype=dtype, device=device)


def materialize_sharded(model: nn.Module, device: torch.device) -> None:
    """What ``model.to_empty`` does for parameters, which INT8 weights do not know.

    Args:
        model: on the meta device, sharded by FSDP2.
        device: where the parameters will be.
    """
    for module in model.modules():
        for parameter in list(module.parameters(recurse=False)):
            assert isinstance(parameter, DTensor)
            local = empty_like(parameter, device, parameter.dtype)
            made = DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            # FSDP2 keeps the parameters that it made, so they have to stay the same objects.
            new = nn.Parameter(made, requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, new)  # type: ignore[no-untyped-call]


@torch.no_grad()
def fill_int8(initial: InitialWeights, name: str, local: Any, start: int = 0) -> None:
    """Fill an INT8 weight with the initial values of a parameter.

    Args:
        initial: the values.
        name: of the parameter.
        local: what this rank holds of it: whole rows.
        start: the index of its first element in the parameter.
    """
    rows, columns = local.shape
    height = max(1, _ELEMENTS // max(1, columns))
    for first in range(0, rows, height):
        here = slice(first, min(first + height, rows))
        values = torch.empty((here.stop - first, columns), dtype=torch.float32, device=local.int_data.device)
        initial.fill(name, values, start + first * columns)
        codes, scale = quantize(values, local.scale.dtype)
        local.int_data[here].copy_(codes)
        local.scale[here].copy_(scale)


def fill(initial: InitialWeights, name: str, parameter: Tensor, start: int = 0) -> None:
    """Fill what this rank holds of a parameter, in INT8 or not, from element ``start`` on."""
    local = local_of(parameter)
    if holds_int8(parameter):
        fill_int8(initial, name, local, start)
    elif math.prod(local.shape):
        initial.fill(name, local.detach(), start)
