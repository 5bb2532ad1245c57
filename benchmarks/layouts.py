"""One rank's step under each layout, on the meta device: nothing is allocated, and no other rank exists.

"whole" and "fsdp2" are the real optimizers on a real model (``fully_shard`` over torch's fake process group). Under
ZeRO and FSDP1 the step's own classes get the flat partitions that the engine would make, which itself cannot run on the
meta device. Collectives are replaced by nothing, their buffers stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import apollo_dist
from apollo_dist.exchange import collectives
from apollo_dist.kernels.table import choose
from apollo_dist.planning.estimate import RULES, divide
from apollo_dist.planning.fake import fake_ranks
from apollo_dist.pretrain.model import decoder_layers
from apollo_dist.sharding.local_shard import LocalShard, ShardGroup
from apollo_dist.sharding.regions import FlatPartition, whole_partition
from apollo_dist.state.slots import Slot
from apollo_dist.step.elementwise import ElementwiseTensor, step_elementwise
from apollo_dist.step.run import step_shard_group
from apollo_dist.step.shard_group import Entry, ShardGroupStep
from apollo_dist.step.specs import specs_of
from apollo_dist.weights.int8 import holds_int8

Shapes = dict[str, tuple[int, ...]]
META = torch.device("meta")
# Engines with flat partitions, by the name that ``planning.estimate`` has for them.
FLAT = {"fsdp1": "fsdp1", "zero1": "zero", "zero2": "zero", "zero3": "zero3"}
LAYOUTS = ("whole", "fsdp2", *FLAT)


@contextmanager
def one_rank(layout: str, world: int) -> Iterator[None]:
    """What has to stand around ``make_step`` and the steps of a layout: fake ranks, and collectives of no network."""
    if layout == "whole":
        yield
        return
    saved = dist.all_to_all_single, dist.all_reduce, collectives.wait, collectives.device_for
    collectives.wait = lambda work, where: None
    collectives.device_for = lambda group, device: device
    try:
        with fake_ranks(world):
            dist.all_to_all_single = dist.all_reduce = lambda *args, **kwargs: None
            yield
    finally:
        dist.all_to_all_single, dist.all_reduce, collectives.wait, collectives.device_for = saved


def make_step(
    model: nn.Module, layout: str, world: int, weights: torch.dtype, grads: torch.dtype, options: dict[str, Any]
) -> tuple[Callable[[], Any], dict[str, int], list[dict[str, Any]]]:
    """A function that takes one step, how many elements of either kind it updates, and its parameter groups.

    Args:
        model: on the meta device; sharded afterwards under "fsdp2".
        layout: one of ``LAYOUTS``.
        world: ranks that divide the model; 1 with "whole".
        weights, grads: dtypes of both. int8: those of the blocks' linear layers in INT8, with a scale a row, as
            torchao stores them, and all others in bf16; only with "whole".
        options: of ``APOLLO``, with ``rank`` and ``scale_type``.
    """
    model = model.to(torch.bfloat16 if weights == torch.int8 else weights)
    if layout in FLAT:
        return _flat_step(model, FLAT[layout], world, weights, grads, options)
    group = None
    if layout == "fsdp2":
        _shard(model, world)
        group = dist.new_group([0])  # no other rank exists that could agree
    if weights == torch.int8:
        from torchao.prototype.quantized_training import int8_weight_only_quantized_training
        from torchao.quantization import quantize_

        quantize_(model.model, int8_weight_only_quantized_training())
    for p in model.parameters():
        if grads != p.dtype:
            p.grad_dtype = grads
        p.grad = torch.empty(p.shape, dtype=grads, device=META) if holds_int8(p) else torch.empty_like(p, dtype=grads)
    optimizer = apollo_dist.APOLLO(model, process_group=group, **options)
    plans = optimizer.prepare()
    low = {m.shard.name for plan in plans for step in plan.shard_groups for m in step.matrices}
    held = [shard for plan in plans for shard, _ in plan.shards]
    elements = {True: 0, False: 0}
    for shard in held:
        elements[shard.name in low] += shard.numel
    return optimizer.step, {"matrices": elements[True], "rest": elements[False]}, optimizer.param_groups


def _shard(model: nn.Module, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _flat_step(
    model: nn.Module, layout: str, world: int, weights: torch.dtype, grads: torch.dtype, options: dict[str, Any]
) -> tuple[Callable[[], Any], dict[str, int], list[dict[str, Any]]]:
    """The step of rank 0 over the flat partitions that an engine makes of the model's parameters."""
    shapes: Shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    # The partitions are made of the groups that the optimizer made of the model.
    known = {id(p): name for name, p in model.named_parameters()}
    made = apollo_dist.APOLLO(model, process_group=dist.new_group([0]), **options).param_groups
    groups = {known[id(p)]: group for group in made for p in group["params"]}
    low = {name for name, group in groups.items() if group["rank"] is not None}
    kernels = options.get("kernels", "auto")
    shard_group = ShardGroup(dist.group.WORLD, world, dist.get_rank()) if world > 1 else ShardGroup()
    entries: list[Entry] = []
    tensors: list[ElementwiseTensor] = []
    elements = {"matrices": 0, "rest": 0}
    for name, partition in divide(shapes, low, layout, world).items():
        shard = _flat(name, shapes[name], partition, shard_group, weights, grads, layout)
        group = groups[name]
        elements["matrices" if name in low else "rest"] += shard.numel
        if name in low:
            listed = specs_of(shard, RULES.matrix, group)
            entries += [Entry(shard, *each, RULES.matrix, group) for each in listed]
        elif shard.numel:
            table = choose(kernels, shard.device, shard.compute_dtype)
            tensors.append(ElementwiseTensor(shard, RULES.element, group, Slot(), table))
    step = ShardGroupStep(entries)
    step.load(lambda name: Slot(), options.get("cache_projection") is True, kernels)

    @torch.no_grad()
    def take() -> None:
        step_shard_group(step, 0)
        step_elementwise(tensors, 0)

    return take, elements, made


def _flat(
    name: str,
    shape: tuple[int, ...],
    partition: FlatPartition,
    shard_group: ShardGroup,
    weights: torch.dtype,
    grads: torch.dtype,
    layout: str,
) -> LocalShard:
    count = partition.numel(shard_group.rank)
    weight, grad = (torch.empty(count, dtype=dtype, device=META) for dtype in (weights, grads))
    return LocalShard(
        name=name,
        shape=shape,
        dtype=weights,
        device=META,
        layout=layout,
        group=shard_group,
        partition=partition if shard_group.size > 1 else whole_partition(count),
        weight=lambda: weight,
        grad=lambda: grad,
    )


def adamw_step(elements: int, weights: torch.dtype, grads: torch.dtype) -> Callable[[], Any]:
    """torch's fused AdamW on as many elements, with moments like the weights, as it makes them."""
    weight = nn.Parameter(torch.empty(elements, dtype=weights, device=META))
    if grads != weights:
        weight.grad_dtype = grads
    weight.grad = torch.empty(elements, dtype=grads, device=META)
    state: list[Tensor] = [torch.empty_like(weight) for _ in range(2)]
    count = torch.empty((), dtype=torch.float32, device=META)

    @torch.no_grad()
    def take() -> None:
        torch._fused_adamw_(
            [weight],
            [weight.grad],
            [state[0]],
            [state[1]],
            [],
            [count],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=1e-3,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    return take
