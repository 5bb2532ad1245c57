"""DeepSpeed's wrappers: which elements of which parameter are in the tensors that ``step()`` sees.

With ``zero3.py`` and ``zero_engine.py`` the only file that reads DeepSpeed's attributes (verified on the versions of
docs/versions.md). Under ZeRO the parameters that the optimizer was built with are no longer in ``param_groups`` at
``step()``: stages 1 and 2 and BF16_Optimizer put one flat fp32 partition for each group there, stage 3 one for each
sub-group in turn, ZeRO-0 in bf16 or fp16 fp32 clones. With ``offload_optimizer`` these tensors, and so the states, are
on the CPU.

A parameter's place in its group's flat buffer is read from its data pointer. DeepSpeed's own maps
(``_hp_mapping``, ``_param_slice_mappings``) are wrong under ``round_robin_gradients``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import whole
from ..flat import flat_shard, tell_other_weights
from ..internals import UnknownInternals, require, version_of
from ..local_shard import LocalShard, ShardGroup
from ..regions import cut_ranges
from . import zero3

Name = Callable[[Tensor], str]

# Where the two kinds of flat wrappers keep: the model's parameters, their flat buffer, this rank's fp32 partition, and
# the views of the flat buffer, by rank, that a step copies the partitions to.
_FLAT_ATTRIBUTES = (
    ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups"),
    ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition", "bf16_partitioned_groups"),
)


@dataclass(frozen=True)
class Engine:
    """What stands between DeepSpeed and its client optimizer.

    Attributes:
        wrapper: DeepSpeed's optimizer that holds ours as ``.optimizer``, or None (ZeRO-0 in fp32).
        module: the engine's model, where it was found.
        warming_up: whether this ``step()`` is the one with zero gradients that FP16_UnfusedOptimizer makes while
            it is built, which is no training step.
        driver: the engine itself, where it was found.
    """

    wrapper: Any = None
    module: nn.Module | None = None
    warming_up: bool = False
    driver: Any = None


def from_engine(engine: Any, optimizer: object) -> Engine:
    """The wrapper and module of a ``deepspeed`` engine that drives ``optimizer``.

    Raises:
        ValueError: if the engine drives another optimizer.
    """
    outer = getattr(engine, "optimizer", None)
    if outer is optimizer:
        return Engine(None, engine.module, driver=engine)
    if getattr(outer, "optimizer", None) is optimizer:
        return Engine(outer, engine.module, driver=engine)
    raise ValueError(
        f"attach: the engine's optimizer is {type(outer).__name__}, which does not hold this APOLLO. Pass the "
        "optimizer to deepspeed.initialize(optimizer=...) and attach the engine that it returns"
    )


def find(optimizer: object) -> Engine:
    """Find DeepSpeed's wrapper and engine in the calls that led to ``optimizer.step()``.

    For versions of DeepSpeed whose engine has no ``_do_optimizer_sanity_check``, where ``deepspeed.initialize`` tells
    the optimizer its engine (``ShardedOptimizer.driven_by``), and for wrappers without an engine. There is no pointer
    back from a client optimizer to its wrapper, but the wrapper is always among the callers. Costs some 20 us; the
    caller keeps the answer.
    """
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    runtime = sys.modules.get("deepspeed.runtime.engine")
    if base is None or runtime is None:
        return Engine()
    require(base, "DeepSpeedOptimizer")
    require(runtime, "DeepSpeedEngine")
    wrapper, driver, warming_up = None, None, False
    frame = sys._getframe(1)
    while frame is not None:
        # Only DeepSpeed's own frames: to ask a frame for its locals keeps them alive for as long as it runs, and the
        # frames of a training script hold models.
        inside = str(frame.f_globals.get("__name__", "")).partition(".")[0] == "deepspeed"
        caller = frame.f_locals.get("self") if inside else None
        if isinstance(caller, base.DeepSpeedOptimizer) and getattr(caller, "optimizer", None) is optimizer:
            wrapper = caller
            warming_up = warming_up or frame.f_code.co_name == "initialize_optimizer_states"
        elif isinstance(caller, runtime.DeepSpeedEngine) and wrapper in (None, getattr(caller, "optimizer", wrapper)):
            driver = caller
            break
        frame = frame.f_back  # type: ignore[assignment]
    return Engine(wrapper, getattr(driver, "module", None), warming_up, driver)


def config(driver: Any) -> Mapping[str, Any]:
    """The configuration of a DeepSpeed engine, as it was read from JSON, and the accumulation that follows from it."""
    require(driver, "_config", "gradient_accumulation_steps")
    require(driver._config, "_param_dict")
    return {**driver._config._param_dict, "gradient_accumulation_steps": driver.gradient_accumulation_steps()}


def unsupported(driver: Any) -> list[str]:
    """Why a DeepSpeed engine is refused, beyond its configuration (``sharding.deepspeed.unsupported``)."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    found = []
    slices = bwc_tensor_model_parallel_world_size(getattr(driver, "mpu", None))
    if slices > 1:
        found.append(
            f"mpu: each of {slices} model-parallel ranks holds a slice of a matrix and would take it for the whole; "
            "train without tensor parallelism"
        )
    experts = [name for name, parameter in driver.module.named_parameters() if _is_expert(parameter)]
    if experts:
        found.append(
            f"{experts[0]} and {len(experts) - 1} others are experts of DeepSpeed's MoE, where ranks hold different "
            "matrices under the same names; use experts that are plain parameters of every rank"
        )
    return found


def _is_expert(parameter: Any) -> bool:
    """Whether DeepSpeed distributes a parameter over ranks as an expert, by its MoE layers or by AutoEP."""
    return (
        not getattr(parameter, "allreduce", True)
        or getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"
    )


def names(wrapper: Any) -> dict[int, str]:
    """Names of the model's parameters as the wrapper knows them, by ``id``; empty if it knows none."""
    known = getattr(wrapper, "param_names", None) or {}
    return {id(parameter): name for parameter, name in known.items()}


def updated(wrapper: Any) -> set[int]:
    """The ids of the model's parameters that a wrapper updates: those that were trainable when it was made."""
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(wrapper, attribute):
            return {id(parameter) for group in getattr(wrapper, attribute) for parameter in group}
    return set()


def read(wrapper: Any, tensor: Tensor, name_of: Name) -> list[LocalShard] | None:
    """The shards inside one tensor of ``param_groups``, or None if the wrapper does not manage it.

    Args:
        wrapper: DeepSpeed's optimizer wrapper.
        tensor: a flat partition, or an fp32 clone.
        name_of: names a parameter of the model.

    Raises:
        UnknownInternals: for a wrapper that cannot be read.
        ValueError: if it is not laid out as expected.
    """
    kind = type(wrapper).__name__
    if zero3.is_stage3(wrapper):
        return zero3.read(wrapper, tensor, name_of)
    for attributes in _FLAT_ATTRIBUTES:
        if hasattr(wrapper, attributes[2]):
            require(wrapper, *attributes, "real_dp_process_group")
            parameters, flats, partitions, views = (getattr(wrapper, attribute) for attribute in attributes)
            found = [i for i, partition in enumerate(partitions) if partition is tensor]
            # An error in a later group has to come before the first one steps.
            later = range(1, len(partitions)) if found == [0] else ()
            shards = [
                _read_flat(parameters[i], flats[i], partitions[i], views[i], wrapper.real_dp_process_group[i], name_of)
                for i in (*found, *later)
            ]
            return shards[0] if found else None
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):
        for model_params, clones in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, clone in zip(model_params, clones, strict=True):
                if clone is tensor:
                    return [whole.read(name_of(parameter), clone, parameter)]
        return None
    raise UnknownInternals(
        f"cannot read the layout of DeepSpeed {version_of('deepspeed')}'s {kind}; install a version of the table in "
        "docs/versions.md"
    )


def _read_flat(
    parameters: Sequence[Tensor],
    flat: Tensor,
    partition: Tensor,
    views: Sequence[Tensor],
    process_group: Any,
    name_of: Name,
) -> list[LocalShard]:
    """Intersect every parameter's place in the flat buffer with every rank's partition of it.

    Places are addresses: values may differ before the first step, see ``tell_other_weights``.
    """
    group = ShardGroup.of(process_group)
    n = partition.numel()
    if n * group.size != flat.numel():
        raise ValueError(f"{group.size} partitions of {n} elements do not make the flat buffer of {flat.numel()}")
    mine = views[group.rank]
    if mine.numel() != n or mine.data_ptr() != flat.data_ptr() + group.rank * n * flat.element_size():
        raise ValueError(
            f"the partition of rank {group.rank} is not elements {group.rank * n}..{group.rank * n + n} of its ZeRO "
            "flat buffer; this layout cannot be read"
        )
    shards, pairs = [], []
    for parameter in parameters:
        name = name_of(parameter)
        start, remainder = divmod(parameter.data_ptr() - flat.data_ptr(), flat.element_size())
        if remainder or start < 0 or start + parameter.numel() > flat.numel():
            raise ValueError(f"{name} does not lie inside its ZeRO flat buffer (offset {start} of {flat.numel()})")
        ranges = cut_ranges(start, parameter.numel(), n, group.size)
        low, high = ranges[group.rank]
        at = low + start - group.rank * n if high > low else 0
        shard = flat_shard(name, tuple(parameter.shape), parameter, partition, at, group, ranges)
        pairs.append((shard, parameter.reshape(-1)[low:high]))
        shards.append(shard)
    tell_other_weights(pairs)
    return shards
