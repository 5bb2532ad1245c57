"""FSDP2's modules as the backward pass sees them: whose gradients are reduced together, and whether they are at all.

Reads attributes of FSDP2 that are not public (verified on torch 2.6 to 2.15).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from . import dtensor
from .internals import first_of, require, version_of

# From this version of torch on FSDP2 is right on CPUs. In 2.8 gloo's reduce-scatter makes a sum of the average that
# FSDP2 asks for in fp32 and bf16, without a word; in 2.6 the first forward pass fails. 2.9 and 2.10 were not run.
RIGHT_ON_CPU = "2.11"


def check_right(tensors: Iterable[Tensor]) -> None:
    """Refuse FSDP2 on CPUs where the installed torch gives other gradients than the average; local.

    Args:
        tensors: the parameters of an optimizer.

    Raises:
        ValueError: if there are FSDP2 parameters of a mesh of CPUs, and torch is older than ``RIGHT_ON_CPU``.
    """
    if TorchVersion(torch.__version__) >= RIGHT_ON_CPU or not dtensor.sharded_modules():
        return
    for tensor in tensors:
        if not dtensor.is_dtensor(tensor) or tensor.dtype not in (torch.float32, torch.bfloat16):
            continue
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        if mesh.device_type == "cpu" and mesh.size() > 1:
            raise ValueError(
                f"FSDP2 on CPUs with torch {version_of('torch')}: over gloo it sums {tensor.dtype} gradients over the "
                f"ranks instead of averaging them, or fails. Install torch {RIGHT_ON_CPU} or later, or use GPUs or DDP"
            )


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
