"""What ranks of a tiny real LLaMA hold and send, measured: the other side of the planner's tests."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apollo_dist import APOLLO
from apollo_dist.planning.estimate import divide, shard_numel
from apollo_dist.pretrain.config import ModelConfig
from apollo_dist.pretrain.model import build_model, decoder_layers
from apollo_dist.pretrain.optimizers import local
from apollo_dist.sharding.names import canonical_name

from ..engines import initialize, prepare, zero_config

RANK = 4
TINY = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=44, num_layers=2, num_heads=4, num_kv_heads=2
)  # fmt: skip


def model() -> nn.Module:
    return build_model(TINY, 8, 0)


def optimizers(module: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {"apollo": APOLLO(module, rank=RANK), "adamw": torch.optim.AdamW(module.parameters())}


def state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state; of AdamW its moments, without torch's counter of steps, four bytes a tensor."""
    if isinstance(optimizer, APOLLO):
        return optimizer.state_bytes()
    kept = (s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    return sum(local(t).numel() * t.element_size() for t in kept)


def sent(optimizer: torch.optim.Optimizer) -> int:
    if not isinstance(optimizer, APOLLO):
        return 0
    return sum(sum(u.exchange.bytes_sent) for b in optimizer._parts.plans.built.values() for u in b.shard_groups)


def memory_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under some tensors: padding counts."""
    storages = (local(t).untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def loss(module: nn.Module) -> Tensor:
    tokens = torch.arange(16).view(2, 8)
    return module(input_ids=tokens, labels=tokens).loss


def native(engine: str, world: int) -> dict[str, dict[str, int]]:
    """DDP and FSDP2."""
    found = {}
    for kind in ("apollo", "adamw"):
        module = model()
        if engine == "ddp":
            module = nn.parallel.DistributedDataParallel(module)
        else:
            mesh = init_device_mesh("cpu", (world,))
            for layer in decoder_layers(module):
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
        optimizer = optimizers(module)[kind]
        loss(module).backward()
        weights = memory_of(p.detach() if engine == "ddp" else p for p in module.parameters())
        gradients = memory_of(p.grad for p in module.parameters())
        optimizer.step()
        found[kind] = {
            "weights": weights, "gradients": gradients, "masters": 0, "state": state(optimizer),
            "sent": sent(optimizer),
        }  # fmt: skip
    return found


def zero(stage: int) -> dict[str, dict[str, int]]:
    """DeepSpeed ZeRO in fp32, which keeps fp32 masters all the same."""
    prepare()
    found = {}
    for kind in ("apollo", "adamw"):
        module = model()
        optimizer = optimizers(module)[kind]
        config = zero_config(stage, zero_allow_untested_optimizer=True)
        engine = initialize(module, config, optimizer=optimizer)
        engine.backward(loss(engine))
        engine.step()
        wrapper = engine.optimizer
        if stage == 3:
            weights = sum(4 * p.ds_tensor.numel() for p in module.parameters())
            masters = wrapper.fp32_partitioned_groups_flat
        else:
            weights = sum(4 * p.numel() for p in module.parameters())
            masters = wrapper.single_partition_of_fp32_groups
        found[kind] = {
            "weights": weights, "masters": sum(4 * m.numel() for m in masters), "state": state(optimizer),
            "sent": sent(optimizer),
        }  # fmt: skip
    return found


def fsdp1_agrees(rank: int, world: int, low_precision: bool) -> bool:
    """Whether FSDP1's own records of what this rank holds are those of ``divide``."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    module = model()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    size = 2 if low_precision else 4
    partitions = divide(shapes, (), "fsdp1", world, size)
    wrapped = FullyShardedDataParallel(
        module,
        auto_wrap_policy=ModuleWrapPolicy({type(decoder_layers(module)[0])}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16) if low_precision else None,
    )
    seen, total = 0, 0
    for name, inner in wrapped.named_modules():
        if not isinstance(inner, FullyShardedDataParallel) or inner._flat_param is None:
            continue
        flat = inner._flat_param
        total += flat.numel()
        for fqn, info in zip(flat._fqns, flat._shard_param_infos, strict=True):
            start, stop = partitions[canonical_name(f"{name}.{fqn}" if name else fqn)].ranges[rank]
            held = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
            assert (start, stop) == held, (fqn, start, stop, held)
            seen += 1
    assert seen == len(shapes)
    assert total == shard_numel(shapes, (), "fsdp1", world, size)
    return sum(math.prod(shape) for shape in shapes.values()) <= total * world


def measure(rank: int, world: int) -> dict[str, dict[str, dict[str, int]]]:
    """Engine -> optimizer -> bytes on this rank."""
    if world > 1:
        assert fsdp1_agrees(rank, world, False)
        assert fsdp1_agrees(rank, world, True)
    return {
        "ddp": native("ddp", world),
        "fsdp2": native("fsdp2", world),
        "zero2": zero(2),
        "zero3": zero(3),
    }
