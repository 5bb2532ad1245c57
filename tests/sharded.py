"""Models under FSDP1, FSDP2 and tensor parallelism, on CPU with gloo."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

FSDP1 = {
    "full": {"sharding_strategy": ShardingStrategy.FULL_SHARD},
    "grad op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
    "none": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "hybrid": {"sharding_strategy": ShardingStrategy.HYBRID_SHARD},
    "one flat": {},  # all matrices in the root's flat parameter
}


def fsdp1(model: nn.Module, kind: str, world: int) -> nn.Module:
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), **FSDP1[kind]}
    if kind == "hybrid":
        # Shards of one rank each are no case: FSDP1 then takes NO_SHARD, and averages nothing over the replicas.
        options["device_mesh"] = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    if kind != "one flat":
        for i, block in enumerate(model.layers):
            model.layers[i] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


def fsdp2(model: nn.Module, kind: str, world: int) -> nn.Module:
    options: dict = {"mesh": init_device_mesh("cpu", (world,))}
    if kind == "dim 1":
        options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() > 1 and p.shape[1] % world == 0 else None
    elif kind == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif kind == "kept":
        options["reshard_after_forward"] = False
    for block in model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def tensor_parallel(model: nn.Module, kind: str, mesh: DeviceMesh, least: int) -> nn.Module:
    """Divide the linear layers over ``mesh["tp"]``: rows, columns, or alternating; norms and embedding have no plan.

    Nor have matrices with fewer than ``least`` rows or columns to divide.
    """
    for i, block in enumerate(model.layers):
        dim = {"rows": 0, "columns": 1}.get(kind, i % 2)
        for name, p in list(block.named_parameters()):
            if not name.startswith("linear.") and name != "weight":
                continue
            matrix = block.linear.weight if name.startswith("linear.") else p
            if matrix.shape[dim] < least:
                continue
            placement = Shard(dim) if p.dim() > 1 else Replicate() if dim else Shard(0)
            divided = nn.Parameter(distribute_tensor(p.detach(), mesh["tp"], [placement]), p.requires_grad)
            owner, leaf = (block.linear, name[7:]) if name.startswith("linear.") else (block, name)
            setattr(owner, leaf, divided)
    return model


def tp(model: nn.Module, kind: str, world: int) -> nn.Module:
    """Tensor parallelism in pairs, with FSDP2 around it where there are more ranks."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    # FSDP2 cannot reduce what is empty on a rank: "_chunk_cat expects non-empty tensor".
    model = tensor_parallel(model, kind, mesh, least=2 if world > 2 else 1)
    if world > 2:
        for block in model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def whole(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights by their own names, on every rank."""
    if not isinstance(wrapped, FullyShardedDataParallel):
        named = {name.removeprefix("module."): p for name, p in wrapped.named_parameters()}  # DDP's prefix
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named.items()}
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        named = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in wrapped.named_parameters()}
        return {name: p.detach().clone() for name, p in named.items()}
