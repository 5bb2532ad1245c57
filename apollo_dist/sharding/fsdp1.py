"""FSDP1 (``FullyShardedDataParallel`` with ``use_orig_params=True``): which part of a flat parameter a parameter is.

Each wrapped module's parameters lie one after the other in one flat parameter, with padding where addresses are
aligned, and every rank of the module's group holds an even part of it, which cuts parameters anywhere::

        parameter 0      parameter 1
        [ 0 1 2 3 4 . . ][ 0 1 2 | 3 4 5 6 7 8 . ]
          rank 0                   rank 1

The parameters that an optimizer sees are views of this rank's part, 1-D, and empty where it holds nothing: then their
gradient is None whatever the others have. Nothing leads from a parameter to its flat parameter, so modules are
registered when a model is at hand. Attributes of torch's flat parameters are read in this file only (verified on torch
2.6 to 2.15).
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .internals import UnknownInternals, require
from .local_shard import WHOLE, LocalShard, ShardGroup
from .parameters import note_shape
from .regions import FlatPartition, Range, cut_ranges, whole_partition

# Parameter -> (the FSDP module that flattened it, its number there). The module, held weakly, holds the parameter.
_known: Any = WeakIdKeyDictionary()


_OF_FLAT_PARAMETERS = (
    "_params", "_shapes", "_strides", "_contiguities", "_param_extensions", "_shard_param_infos",
    "_numels_with_padding", "_is_padding_mask", "_sharded_size",
)  # fmt: skip


def register(model: nn.Module) -> None:
    """Note where the parameters of a model's FSDP1 modules lie; nothing happens for other models.

    Raises:
        UnknownInternals: if this version of torch does not say it as the versions of docs/versions.md do.
    """
    for module in _modules(model):
        require(module, "_flat_param", "_handle")
        flat = module._flat_param
        if flat is None:
            continue
        require(flat, *_OF_FLAT_PARAMETERS)
        if flat._params is not None:
            for number, parameter in enumerate(flat._params):
                if not is_flattened(parameter):
                    raise UnknownInternals(
                        f"torch {torch.__version__}: FSDP1 does not mark its parameters with _fsdp_flattened, by "
                        "which APOLLO knows them; use FSDP2, or a version of the table in docs/versions.md"
                    )
                _known[parameter] = (weakref.ref(module), number)
                note_shape(parameter, tuple(flat._shapes[number]))


def _modules(model: nn.Module) -> Iterator[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            yield module


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 made ``tensor`` a view of a flat parameter."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def check(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a parameter of FSDP1 whose place in its flat parameter cannot be known."""
    if getattr(tensor, "_is_flat_param", False):
        raise ValueError(
            f"{name} is a flat parameter of FSDP1, in which matrices cannot be told apart; wrap the model with "
            "FullyShardedDataParallel(..., use_orig_params=True)"
        )
    if is_flattened(tensor) and _found(tensor) is None:
        raise ValueError(
            f"{name} is an FSDP1 parameter, which does not know its shape nor its place among the ranks: pass the "
            "wrapped model, APOLLO(model, ...), or groups made by apollo_dist.param_groups(model, ...)"
        )


def _found(tensor: Tensor) -> tuple[Any, int, Any] | None:
    """A parameter's flat parameter, its number there, and the flat parameter's handle."""
    if not is_flattened(tensor):
        return None
    module, number = _known.get(tensor, (None, 0))
    owner = module() if module is not None else None
    return None if owner is None else (owner._flat_param, number, owner._handle)


def read(name: str, parameter: Tensor) -> LocalShard:
    """The shard of an FSDP1 parameter.

    Raises:
        ValueError: if it is not registered, not contiguous, sharded in another way as well, or gathered at present.
    """
    check(name, parameter)
    found = _found(parameter)
    assert found is not None
    flat, number, handle = found
    shape: tuple[int, ...] = tuple(flat._shapes[number])
    if not flat._contiguities[number]:
        raise ValueError(
            f"{name} is not contiguous, and FSDP1 flattened it in the order of its strides {flat._strides[number]}; "
            "make it contiguous before the model is wrapped"
        )
    if flat._param_extensions[number] is not None:
        raise ValueError(f"{name} is a DTensor inside FSDP1; use FSDP2 (fully_shard) together with tensor parallelism")
    group, partition = WHOLE, whole_partition(math.prod(shape))
    if handle.uses_sharded_strategy:
        group = ShardGroup.of(handle.process_group)
    if group.size > 1:
        partition = FlatPartition(
            cut_ranges(_start(flat, number), math.prod(shape), flat._sharded_size.numel(), group.size)
        )
    _check_local(name, parameter, flat._shard_param_infos[number], partition.ranges[group.rank])
    return LocalShard(
        name=name,
        shape=shape,
        dtype=parameter.dtype,
        device=parameter.device,
        layout="fsdp1",
        group=group,
        partition=partition,
        weight=parameter.detach,
        grad=lambda: parameter.grad if parameter.numel() and parameter.requires_grad else None,
    )


def _start(flat: Any, number: int) -> int:
    """Where a parameter begins in the whole flat parameter, paddings counted."""
    starts = accumulate(flat._numels_with_padding, initial=0)
    real: list[int] = [start for start, padding in zip(starts, flat._is_padding_mask, strict=False) if not padding]
    return real[number]


def _check_local(name: str, parameter: Tensor, info: Any, mine: Range) -> None:
    """Raise ValueError unless FSDP1 says the same of this rank's part, and the parameter is that part now."""
    said = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
    if said != mine:
        raise ValueError(
            f"{name}: FSDP1 gives this rank elements {said[0]}..{said[1]}, expected {mine[0]}..{mine[1]}; this version "
            f"of torch ({torch.__version__}) lays flat parameters out in another way"
        )
    if parameter.numel() != mine[1] - mine[0]:
        raise ValueError(
            f"{name} has {parameter.numel()} elements, but this rank's part of it has {mine[1] - mine[0]}: the module "
            "is gathered. Call step() after the backward pass, and not inside of summon_full_params"
        )


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of FSDP1 parameters, which the next forward pass would use however the parts have changed.

    After a forward pass without a backward one (an evaluation) the root module still has its own.
    """
    for module in _modules(model):
        handle = module._handle
        if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(free_unsharded_flat_param=True)
            handle.post_reshard()
            handle._prefetched = False
