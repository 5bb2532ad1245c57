"""Optimizers of torch whose state is numbers for each element of a parameter, such as AdamW: trained for comparison.

Their state lies in ``optimizer.state``, by the tensors that DeepSpeed or FSDP gave them; which elements of which
parameter those are, the layouts say, as for APOLLO.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW

from ..sharding import detect
from ..sharding.deepspeed import zero, zero_engine
from ..sharding.names import canonical_name
from .options import options_of
from .shards import Shards

if TYPE_CHECKING:
    from ..sharding.local_shard import LocalShard
    from .opened import Contents

# Optimizers that are known to work, and the state that they make at their first step: for each element, and one number.
_STATE: dict[type[torch.optim.Optimizer], tuple[tuple[str, ...], tuple[str, ...]]] = {
    AdamW: (("exp_avg", "exp_avg_sq"), ("step",)),
    Adam: (("exp_avg", "exp_avg_sq"), ("step",)),
}


def add(found: Contents, optimizer: torch.optim.Optimizer, module: nn.Module) -> list[LocalShard]:
    """Add the optimizer's state and description to ``found``; the shards of its parameters.

    Raises:
        ValueError: for an optimizer whose state this version does not know.
    """
    known = _STATE.get(type(optimizer))
    if known is None or any(group.get("amsgrad") for group in optimizer.param_groups):
        supported = ", ".join(cls.__name__ for cls in _STATE)
        raise ValueError(
            f"checkpoints hold APOLLO's state, and that of torch's {supported} without amsgrad; the optimizer is "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    names_by_id = {key: canonical_name(name) for key, name in zero.names(found.wrapper).items()}
    names_by_id |= {id(p): canonical_name(name) for name, p in module.named_parameters()}
    engine = zero.Engine(found.wrapper, module)

    def name_of(tensor: Tensor) -> str:
        if id(tensor) not in names_by_id:
            raise ValueError(
                f"the optimizer holds a parameter of shape {tuple(tensor.shape)} that is not in the model: build it "
                "after the model is wrapped or sharded"
            )
        return names_by_id[id(tensor)]

    parameters = found.description.setdefault("parameters", {})
    shards: list[LocalShard] = []
    for call in zero_engine.step_calls(found.wrapper, optimizer.param_groups):
        for group, tensors in call:
            names: list[str] = []
            for tensor in tensors:
                held = detect.read([tensor], name_of, engine)
                for shard in held:
                    names.append(shard.name)
                    parameters[shard.name] = {"kind": type(optimizer).__name__}
                shards += held
                _add_state(found, optimizer.state[tensor], tensor, [h for h in held if h.numel], known)
            _note_group(found, group, names)
    found.description["optimizer"] = {
        "name": type(optimizer).__name__,
        "groups": [{"options": options_of(group), "parameters": names} for group, names in found.groups],
    }
    return shards


def _note_group(found: Contents, group: dict[str, Any], names: list[str]) -> None:
    for known, held in found.groups:
        if known is group:
            held += names
            return
    found.groups.append((group, names))


def _add_state(
    found: Contents,
    state: dict[str, Any],
    tensor: Tensor,
    shards: list[LocalShard],
    known: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    """Add the state of one tensor, which holds parts of several parameters under ZeRO."""
    for moment in known[0]:
        if moment not in state:
            state[moment] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        for shard in shards:
            boxes = shard.partition.boxes(shard.group.rank, shard.shape)
            part = _part(_local(state[moment]), _local(tensor), shard)
            found.tensors[f"optimizer.{shard.name}.{moment}"] = Shards.of(shard.shape, boxes, part, shard.name)
    for number in known[1]:
        if number not in state:
            state[number] = torch.zeros((), dtype=torch.float32)
        copies = {shard.name: state[number].detach().clone().view(1) for shard in shards}
        for name, copy in copies.items():
            found.tensors[f"optimizer.{name}.{number}"] = Shards.whole(copy)
        found.after_load.append(partial(_set_number, state, number, copies))


def _set_number(state: dict[str, Any], number: str, loaded: dict[str, Tensor]) -> None:
    """Take a number over that the parameters in one tensor share here, and maybe did not where they were saved."""
    values = {name: float(value) for name, value in loaded.items()}
    for name, value in values.items():
        if value != next(iter(values.values())):
            raise ValueError(f"the {number} of {', '.join(values)} differ ({name}: {value}), and here they share one")
        state[number].fill_(value)


def _part(state: Tensor, tensor: Tensor, shard: LocalShard) -> Tensor:
    """Where the shard's elements lie in a state that is laid out like ``tensor``."""
    if shard.numel == tensor.numel():
        return state
    at = (shard.weight().data_ptr() - tensor.data_ptr()) // tensor.element_size()
    return state.view(-1)[at : at + shard.numel]


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
