"""DeepSpeed's wrappers: which elements of which parameter are in the tensors that ``step()`` sees.

The only file that reads DeepSpeed's attributes (verified on 0.19.8). Under ZeRO the parameters that the optimizer was
built with are no longer in ``param_groups`` at ``step()``: stages 1 and 2 and BF16_Optimizer put one flat fp32
partition for each group there, ZeRO-0 in bf16 or fp16 puts fp32 clones.

A parameter's place in its group's flat buffer is read from its data pointer. DeepSpeed's own maps
(``_hp_mapping``, ``_param_slice_mappings``) are wrong under ``round_robin_gradients``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .holding import Holding, ShardGroup, whole_cover
from .tiles import FlatCover

Name = Callable[[Tensor], str]

# Where the two kinds of flat wrappers keep: the model's parameters, their flat buffer, this rank's fp32 partition.
_FLAT_ATTRIBUTES = (
    ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
)


@dataclass(frozen=True)
class Engine:
    """What stands between DeepSpeed and its client optimizer.

    Attributes:
        wrapper: DeepSpeed's optimizer that holds ours as ``.optimizer``, or None (ZeRO-0 in fp32).
        module: the engine's model, where it was found.
        warming_up: whether this ``step()`` is the one with zero gradients that FP16_UnfusedOptimizer makes while
            it is built, which is no training step.
    """

    wrapper: Any = None
    module: nn.Module | None = None
    warming_up: bool = False


def from_engine(engine: Any, optimizer: object) -> Engine:
    """The wrapper and module of a ``deepspeed`` engine that drives ``optimizer``.

    Raises:
        ValueError: if the engine drives another optimizer.
    """
    outer = getattr(engine, "optimizer", None)
    if outer is optimizer:
        return Engine(None, engine.module)
    if getattr(outer, "optimizer", None) is optimizer:
        return Engine(outer, engine.module)
    raise ValueError(
        f"attach: the engine's optimizer is {type(outer).__name__}, which does not hold this APOLLO. Pass the "
        "optimizer to deepspeed.initialize(optimizer=...) and attach the engine that it returns"
    )


def find(optimizer: object) -> Engine:
    """Find DeepSpeed's wrapper and engine in the calls that led to ``optimizer.step()``.

    There is no pointer back from a client optimizer to its wrapper, but the wrapper is always among the callers. Costs
    some 20 us; the caller keeps the answer.
    """
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    runtime = sys.modules.get("deepspeed.runtime.engine")
    if base is None or runtime is None:
        return Engine()
    wrapper, module, warming_up = None, None, False
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, base.DeepSpeedOptimizer) and getattr(caller, "optimizer", None) is optimizer:
            wrapper = caller
            warming_up = warming_up or frame.f_code.co_name == "initialize_optimizer_states"
        elif isinstance(caller, runtime.DeepSpeedEngine) and wrapper in (None, getattr(caller, "optimizer", wrapper)):
            module = getattr(caller, "module", None)
            break
        frame = frame.f_back  # type: ignore[assignment]
    return Engine(wrapper, module, warming_up)


def names(wrapper: Any) -> dict[int, str]:
    """Names of the model's parameters as the wrapper knows them, by ``id``; empty if it knows none."""
    known = getattr(wrapper, "param_names", None) or {}
    return {id(parameter): name for parameter, name in known.items()}


def read(wrapper: Any, tensor: Tensor, name_of: Name) -> list[Holding] | None:
    """The holdings inside one tensor of ``param_groups``, or None if the wrapper does not manage it.

    Args:
        wrapper: DeepSpeed's optimizer wrapper.
        tensor: a flat partition, or an fp32 clone.
        name_of: names a parameter of the model.

    Raises:
        ValueError: for a wrapper that this version cannot read, or if it is not laid out as expected.
    """
    kind = type(wrapper).__name__
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        raise ValueError(f"ZeRO stage 3 ({kind}) is not supported yet; use stage 0, 1 or 2")
    if getattr(wrapper, "cpu_offload", False):
        raise ValueError("ZeRO optimizer offload is not supported yet; remove offload_optimizer from the config")
    for parameters, flats, partitions in _FLAT_ATTRIBUTES:
        if hasattr(wrapper, partitions):
            for i, partition in enumerate(getattr(wrapper, partitions)):
                if partition is tensor:
                    group = wrapper.real_dp_process_group[i]
                    return _read_flat(
                        getattr(wrapper, parameters)[i], getattr(wrapper, flats)[i], tensor, group, name_of
                    )
            return None
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):
        for model_params, clones in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, clone in zip(model_params, clones, strict=True):
                if clone is tensor:
                    return [_clone(name_of(parameter), clone)]
        return None
    version = getattr(sys.modules.get("deepspeed"), "__version__", "unknown")
    raise ValueError(f"cannot read the layout of DeepSpeed {version}'s {kind}; this version knows that of 0.19.8")


def _clone(name: str, clone: Tensor) -> Holding:
    from . import whole

    return whole.read(name, clone)


def _read_flat(
    parameters: Sequence[Tensor], flat: Tensor, partition: Tensor, process_group: Any, name_of: Name
) -> list[Holding]:
    """Intersect every parameter's place in the flat buffer with every rank's partition of it."""
    group = ShardGroup.of(process_group)
    n = partition.numel()
    if n * group.size != flat.numel():
        raise ValueError(f"{group.size} partitions of {n} elements do not make the flat buffer of {flat.numel()}")
    holdings = []
    for parameter in parameters:
        name = name_of(parameter)
        start, remainder = divmod(parameter.data_ptr() - flat.data_ptr(), flat.element_size())
        if remainder or start < 0 or start + parameter.numel() > flat.numel():
            raise ValueError(f"{name} does not lie inside its ZeRO flat buffer (offset {start} of {flat.numel()})")
        ranges = []
        for rank in range(group.size):
            low = max(start, rank * n) - start
            high = min(start + parameter.numel(), rank * n + n) - start
            ranges.append((low, high) if low < high else (0, 0))
        low, high = ranges[group.rank]
        at = low + start - group.rank * n if high > low else 0
        holding = _flat_holding(name, tuple(parameter.shape), partition, at, high - low, group, tuple(ranges))
        _check_first_use(holding, parameter, low)
        holdings.append(holding)
    return holdings


def _flat_holding(
    name: str,
    shape: tuple[int, ...],
    partition: Tensor,
    at: int,
    count: int,
    group: ShardGroup,
    ranges: tuple[tuple[int, int], ...],
) -> Holding:
    def grad() -> Tensor | None:
        return None if partition.grad is None else partition.grad.view(-1)[at : at + count]

    return Holding(
        name=name,
        shape=shape,
        dtype=partition.dtype,
        device=partition.device,
        layout="zero",
        group=group,
        cover=FlatCover(ranges) if group.size > 1 else whole_cover(count),
        weight=lambda: partition.detach().view(-1)[at : at + count],
        grad=grad,
    )


def _check_first_use(holding: Holding, parameter: Tensor, start: int) -> None:
    """The partition must hold what the model's parameter holds, or the offsets are wrong."""
    ours = holding.weight().to(parameter.dtype)
    theirs = parameter.detach().reshape(-1)[start : start + ours.numel()]
    if not torch.equal(ours, theirs.to(ours.device)):
        raise ValueError(
            f"{holding.name}: the ZeRO partition does not hold the parameter's values at the expected place; "
            "this layout cannot be read (was the model changed outside of the engine?)"
        )
