"""Layouts of FSDP2 and HSDP, read by the optimizer itself from a real sharded model without memory or other ranks.

torch's "fake" process group stands for all ranks; its collectives do nothing. The model is on the meta device, and
``fully_shard`` and ``APOLLO.prepare`` are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ..optimizers.apollo import APOLLO

if TYPE_CHECKING:
    from ..exchange.plan import Plan
    from ..pretrain.config import ModelConfig
    from ..sharding.local_shard import Partition


@dataclass(frozen=True)
class Reading:
    """What one optimizer found.

    Attributes:
        plans: one for each shard group.
        low_rank, rest: how the parameters of either kind are divided, by name.
    """

    plans: list[Plan]
    low_rank: dict[str, Partition]
    rest: dict[str, Partition]


def meta_model(config: ModelConfig, sequence_length: int = 256) -> nn.Module:
    """The trainer's model on the meta device: names and shapes, no memory.

    Raises:
        ValueError: if transformers is not installed.
    """
    try:
        from ..pretrain.model import deferred_model
    except ModuleNotFoundError as error:
        raise ValueError(f"plans need {error.name}: pip install 'apollo-dist[pretrain]'") from error
    return deferred_model(config, sequence_length)


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A process group of ``world`` ranks of which this process is the first; gone afterwards.

    Raises:
        ValueError: if this process is already part of one.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a plan makes a process group of its own, and this process already has one; plan elsewhere")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def read_fsdp2(model: nn.Module, world: int, shards: int, optimizers: Sequence[dict[str, Any]]) -> list[Reading]:
    """Shard a meta model over ``world`` fake ranks and let optimizers read it.

    Args:
        model: from ``meta_model``; sharded afterwards.
        world: ranks.
        shards: of them divide a parameter; the others hold replicas (HSDP).
        optimizers: for each optimizer the options of ``APOLLO``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ..pretrain.model import decoder_layers

    with fake_ranks(world):
        if shards == world:
            mesh = init_device_mesh("cpu", (world,))
        else:
            mesh = init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # Nothing to agree on with ranks that do not exist.
        alone = dist.new_group([0])
        return [_read(APOLLO(model, process_group=alone, **options)) for options in optimizers]


def _read(optimizer: APOLLO) -> Reading:
    plans: list[Plan] = []
    partitions: tuple[dict[str, Partition], dict[str, Partition]] = ({}, {})
    for build in optimizer.prepare():
        plans += [group_step.plan for group_step in build.shard_groups]
        matrices = {m.shard.name for group_step in build.shard_groups for m in group_step.matrices}
        for shard, _ in build.shards:
            partitions[shard.name not in matrices][shard.name] = shard.partition
    return Reading(plans, *partitions)
