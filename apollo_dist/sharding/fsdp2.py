"""FSDP2's modules as the backward pass sees them: whose gradients are reduced together, and whether they are at all.

Reads attributes of FSDP2 that are not public (verified on torch 2.6 to 2.15).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .internals import first_of, require


def _groups(model: nn.Module) -> Iterator[Any]:
    """FSDP2's parameter groups in ``model``, each once: a ``fully_shard`` of several modules makes one."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    seen: set[int] = set()
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            for group in _groups_of(module):
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group


def _groups_of(module: Any) -> list[Any]:
    """The parameter groups of one ``fully_shard``: a list, or in torch before 2.13 one or None."""
    require(module, "_get_fsdp_state")
    found = first_of(module._get_fsdp_state(), "_fsdp_param_groups", "_fsdp_param_group")
    groups = list(found) if isinstance(found, (list, tuple)) else [found] if found is not None else []
    for group in groups:
        require(group, "fsdp_params", "reduce_grads", "all_reduce_grads")
    return groups


def reduced_together(model: nn.Module) -> list[list[Tensor]]:
    """The sharded parameters of ``model``, divided as FSDP2 reduces their gradients; empty without FSDP2.

    In a backward pass the gradients of one list become ready one after the other, with no other's in between.
    """
    return [[one.sharded_param for one in group.fsdp_params] for group in _groups(model)]


def reduces_gradients(model: nn.Module) -> bool:
    """Whether a backward pass now leaves reduced, sharded gradients; False after ``set_requires_gradient_sync(False)``.

    True without FSDP2.
    """
    return all(group.reduce_grads and group.all_reduce_grads for group in _groups(model))
