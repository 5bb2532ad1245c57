"""From a model on the meta device to one whose weights each rank has made: its own part of them, and no more."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apollo_dist.pretrain.initial import InitialWeights, named_parameters_and_modules
from apollo_dist.pretrain.int8 import empty_like, fill, materialize_sharded
from apollo_dist.weights.int8 import holds_int8

_FSDP1_PREFIX = "_fsdp_wrapped_module."


def place_whole(
    model: nn.Module, initial: InitialWeights, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """``model`` with all weights on ``device``, made there, in ``dtype`` (None: its parameters'); returns it."""
    for name, parameter, module in list(named_parameters_and_modules(model)):
        made = materialize(parameter, module, name, device, dtype or parameter.dtype)
        fill(initial, name, made)
    move_buffers(model, device)
    return model


def materialize(
    parameter: nn.Parameter, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype
) -> nn.Parameter:
    """Give ``module`` memory for one of its meta parameters, not filled; returns the new parameter."""
    empty = empty_like(parameter, device, dtype)
    made = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    setattr(module, name.rpartition(".")[2], made)
    return made


def place_fsdp2(model: nn.Module, initial: InitialWeights, device: torch.device) -> nn.Module:
    """The same after ``fully_shard``: this rank's rows of every matrix, on ``device``; returns the model."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    if any(map(holds_int8, model.parameters())):
        materialize_sharded(model, device)
        move_buffers(model, device)
    else:
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        if parameter.to_local().numel():
            # Rows are contiguous, so that a shard is one run of the flat parameter.
            fill(initial, name, parameter, offsets[0] * math.prod(parameter.shape[1:]))
    return model


def fill_fsdp1(model: nn.Module, initial: InitialWeights, counts: Sequence[dict[str, int]], position: int) -> None:
    """Fill the shards of a model that FSDP1 (``use_orig_params``) has made memory for.

    Args:
        model: the outermost wrapper.
        initial: of the model before it was wrapped.
        counts: of each rank that shares a parameter, in the order of the shards, how many elements it has, by name.
        position: of this rank among them.
    """
    for name, shard in fsdp1_shards(model).items():
        held = [count[name] for count in counts]
        numel = math.prod(initial.shapes[name])
        if sum(held) != numel:
            raise ValueError(f"{name}: FSDP1's shards have {sum(held)} elements together, and it has {numel}")
        if shard.numel():
            initial.fill(name, shard, sum(held[:position]))


def fsdp1_shards(model: nn.Module) -> dict[str, Tensor]:
    """This rank's part of each parameter, by its name in the model that was wrapped."""
    return {name.replace(_FSDP1_PREFIX, ""): p.detach() for name, p in model.named_parameters()}


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the buffers of ``model`` on ``device``."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
