"""ZeRO stage 3: which elements of which parameter are in the fp32 flat of a sub-group.

DeepSpeed divides every parameter on its own: rank k of the parameter's group holds elements k * n .. k * n + n with
n = ceil(numel / ranks). Whatever passes the end of the parameter is padding, of which the last ranks may hold nothing
else. A sub-group's flat is its parameters' partitions one after the other, paddings included::

        parameter 0          parameter 1       parameter 2 (smaller than the world)
        [ 0 1 2 3 | 4 5 6 . ][ 0 1 2 | 3 4 5 ][ 0 | . ]
          rank 0    rank 1

``hpZ`` keeps a second copy of the weights in smaller groups, for the forward pass; gradients and fp32 flats stay
divided as above. Called by ``zero.py``; like it, verified on the versions of docs/versions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from ..flat import flat_shard, tell_other_weights
from ..internals import require
from ..local_shard import LocalShard, ShardGroup
from ..regions import even_ranges

Name = Callable[[Tensor], str]


def is_stage3(wrapper: Any) -> bool:
    """Whether a wrapper divides parameters as stage 3 does."""
    return hasattr(wrapper, "fp32_partitioned_groups_flat")


def read(wrapper: Any, flat: Tensor, name_of: Name) -> list[LocalShard] | None:
    """The shards inside a sub-group's flat, or None if it is not one.

    Args:
        wrapper: DeepSpeed's stage 3 optimizer.
        flat: what ``param_groups`` holds during a step: the fp32 partitions of one sub-group.
        name_of: names a parameter of the model.

    Raises:
        ValueError: if the flat is not laid out as expected.
    """
    require(
        wrapper, "fp32_partitioned_groups_flat", "fp16_groups", "dp_process_group", "swap_optimizer", "grad_position"
    )
    flats = wrapper.fp32_partitioned_groups_flat
    for i, candidate in enumerate(flats):
        if candidate is flat:
            if i == 0:
                # An error in a later sub-group has to come before the first one steps.
                _check_swapping(wrapper, name_of)
                for parameters, later in zip(wrapper.fp16_groups[1:], flats[1:], strict=True):
                    _read_sub_group(wrapper, parameters, later, name_of, swapped_out=wrapper.swap_optimizer)
            return _read_sub_group(wrapper, wrapper.fp16_groups[i], flat, name_of)
    return None


def _read_sub_group(
    wrapper: Any, parameters: Sequence[Any], flat: Tensor, name_of: Name, swapped_out: bool = False
) -> list[LocalShard]:
    """The shards inside a flat; ``swapped_out`` says that its memory may be another's, since it is not its turn."""
    sizes = [int(parameter.ds_tensor.ds_numel) for parameter in parameters]
    if not swapped_out and flat.numel() != sum(sizes):
        raise ValueError(
            f"a ZeRO-3 sub-group of {len(sizes)} partitions with {sum(sizes)} elements has a flat buffer of "
            f"{flat.numel()}; this layout cannot be read"
        )
    shards, pairs = [], []
    for parameter, size, at in zip(parameters, sizes, accumulate(sizes, initial=0), strict=False):
        name = name_of(parameter)
        # DeepSpeed's own map, by which it puts gradients into the flat. Values say nothing: they may differ before the
        # first step, see ``tell_other_weights``.
        _, said, numel = wrapper.grad_position[wrapper.get_param_id(parameter)]
        if (said, numel) != (at, size):
            raise ValueError(
                f"{name}: DeepSpeed puts its {numel} gradients at {said} of its ZeRO-3 sub-group, expected {size} at "
                f"{at}; this layout cannot be read"
            )
        group = ShardGroup.of(getattr(parameter, "ds_process_group", wrapper.dp_process_group))
        ranges = even_ranges(parameter.ds_numel, group.size)
        if size != -(-parameter.ds_numel // group.size):
            raise ValueError(
                f"{name}: its ZeRO-3 partition has {size} elements, expected {-(-parameter.ds_numel // group.size)} "
                f"for {parameter.ds_numel} elements on {group.size} ranks"
            )
        shard = flat_shard(name, tuple(parameter.ds_shape), parameter, flat, at, group, ranges)
        if not swapped_out and parameter.ds_tensor.status.name == "AVAILABLE":  # else it is on NVMe, too
            pairs.append((shard, parameter.ds_tensor.view(-1)[: shard.numel]))
        shards.append(shard)
    tell_other_weights(pairs)
    return shards


def _check_swapping(wrapper: Any, name_of: Name) -> None:
    """Refuse gradients that DeepSpeed would read back from NVMe to an address that direct I/O cannot write to.

    It does not notice: the step would see another gradient's numbers.
    """
    swapper = getattr(wrapper, "optimizer_swapper", None)
    if swapper is None:
        return
    for parameters in wrapper.fp16_groups:
        sizes = [int(parameter.ds_tensor.ds_numel) for parameter in parameters]
        for parameter, size, at in zip(parameters, sizes, accumulate(sizes, initial=0), strict=False):
            begin, step = at * swapper.swap_element_size, swapper.aligned_bytes
            if begin % step and swapper.is_swappable_tensor(numel=size):
                raise ValueError(
                    f"{name_of(parameter)}: DeepSpeed keeps its gradient on NVMe, from byte {begin} of its sub-group "
                    f"on, and reads it back wrongly unless that is a multiple of {step}. Set sub_group_size to 1, so "
                    'that every parameter begins a sub-group, or offload_optimizer.device to "cpu"'
                )
