"""A model on the meta device, partitioned as ZeRO-3 does: one matrix at a time, and each rank fills its partition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apollo_dist.pretrain.initial import InitialWeights, named_parameters_and_modules
from apollo_dist.pretrain.placing import materialize, move_buffers

if TYPE_CHECKING:
    from apollo_dist.pretrain.distributed import Ranks


def partition(model: nn.Module, initial: InitialWeights, ranks: Ranks, dtype: torch.dtype, values: Any) -> None:
    """Partition ``model`` as ``zero.Init`` partitions one while it is built. Collective.

    ``zero.Init`` itself would have each layer draw its own initial weights on rank 0. Largest matrices first, while
    there is little else: at the peak a rank has its partitions and one whole matrix.

    Args:
        model: on the meta device, with real buffers.
        initial: its weights.
        ranks: which divide it.
        dtype: of the weights.
        values: DeepSpeed's JSON.
    """
    import deepspeed

    named = sorted(named_parameters_and_modules(model), key=lambda each: -each[1].numel())
    # A partition that is not plain memory of this rank (on NVMe, in int8, or with a second copy) is made of a matrix
    # that is already filled.
    zero = values.get("zero_optimization", {})
    plain = zero.get("offload_param", {}).get("device") != "nvme" and not (
        zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("zero_quantized_nontrainable_weights")
    )
    first: Any = None
    for name, parameter, module in named:

        def allocate(name: str = name, parameter: nn.Parameter = parameter, module: nn.Module = module) -> nn.Parameter:
            made = materialize(parameter, module, name, ranks.device, dtype)
            if not plain:
                initial.fill(name, made.data)
            return made

        made = ranks.together(allocate)  # one rank alone may lack memory, and the next call is collective
        if first is None:
            alone = nn.Module()
            alone.weight = made
            deepspeed.zero.Init(module=alone, config_dict_or_path=values, dtype=dtype)
            first = made
        else:
            first.convert_to_zero_parameters(param_list=[made])
        if plain:
            _fill(name, made, initial, ranks)
    move_buffers(model, ranks.device)


def _fill(name: str, parameter: Any, initial: InitialWeights, ranks: Ranks) -> None:
    """Fill this rank's partition, a run of the flat parameter; what pads the last ones is zero."""
    flat = parameter.ds_tensor.data.view(-1)
    start = min(ranks.rank * flat.numel(), parameter.ds_numel)
    held = min(flat.numel(), parameter.ds_numel - start)
    initial.fill(name, flat[:held], start)
    flat[held:].zero_()
