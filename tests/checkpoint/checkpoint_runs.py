"""Legs of training under different engines with checkpoints between them, beside one undisturbed reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO, checkpoint

from ..engines import full_weights, initialize, prepare, zero_config
from ..exactness.zero_runs import BF16, OFFLOAD, OFFLOAD_BOTH
from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, shapes_of
from ..reference import Reference
from ..sharded import fsdp1, tp, whole

GAP, FROZEN = 4, "layers.2."
# What changes during training and is not among the defaults: the checkpoint must carry it.
LR = 3e-3
DIVIDED = {"stage3_param_persistence_threshold": 0}
ZERO = {
    "zero0": zero_config(0),
    "zero1": zero_config(1),
    "zero2": zero_config(2),
    "zero2 round robin": zero_config(2, zero_optimization={"round_robin_gradients": True}),
    "zero2 offload": zero_config(2, zero_optimization=OFFLOAD, zero_force_ds_cpu_optimizer=False),
    "zero3": zero_config(3, zero_optimization=DIVIDED),
    "zero3 sub-groups": zero_config(3, zero_optimization={**DIVIDED, "sub_group_size": 60}),
    "zero3 persistent": zero_config(3, zero_optimization={"stage3_param_persistence_threshold": 100}),
    "zero0 bf16": zero_config(0, bf16={"enabled": True}),
    "zero1 bf16": zero_config(1, **BF16),
    "zero2 bf16": zero_config(2, **BF16),
    "zero3 bf16": zero_config(3, zero_optimization=DIVIDED, **BF16),
    "zero3 offload": zero_config(3, zero_optimization=DIVIDED | OFFLOAD_BOTH, zero_force_ds_cpu_optimizer=False),
}


class Model(Bag):
    """A ``Bag`` with frozen parameters, buffers with and without dimensions, and a buffer that is not saved."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.layers[0].norm.data.mul_(2.0)
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(FROZEN))


def build(engine: str, world: int, *, seed: int, dtype: torch.dtype):
    """A model with weights from ``seed``, the engine or wrapped model that trains it, and its APOLLO."""
    model = Model(seed).to(dtype)
    ranks = {name: r for name, r in low_rank(model, 3).items() if not name.startswith(FROZEN)}
    if engine in ZERO:
        prepare()
        optimizer = APOLLO(groups_of(model, ranks), update_proj_gap=GAP, seed=5, weight_decay=0.1)
        return model, initialize(model, ZERO[engine], optimizer=optimizer), optimizer
    wrapped = wrap(model, engine, world)
    groups = groups_of(wrapped, ranks)
    return model, wrapped, APOLLO(groups, model=wrapped, update_proj_gap=GAP, seed=5, weight_decay=0.1)


def wrap(model: nn.Module, engine: str, world: int) -> nn.Module:
    """The model under plain, ddp, fsdp1, fsdp2, hsdp or tp (tensor parallelism in pairs, inside FSDP2)."""
    if engine == "plain":
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "fsdp1":
        return fsdp1(model, "full", world)
    if engine == "tp":
        return tp(model, "alternating", world)
    shape, names = ((2, world // 2), ("replicate", "shard")) if engine == "hsdp" else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def advance(trained, optimizer, shapes, steps: range, rank: int, dtype: torch.dtype) -> None:
    """Train for ``steps``, with the gradients that ``rank`` contributes."""
    for step in steps:
        loss = trained(gradients(shapes, step, rank, dtype))
        if hasattr(trained, "backward"):
            trained.backward(loss)
            trained.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def leg(rank: int, world: int, engine: str, root: str, steps: range, dtype: torch.dtype) -> dict[str, Tensor]:
    """Continue from the newest checkpoint, if ``steps`` do not start at 0, and save; the whole weights afterwards."""
    first = steps.start == 0
    # What is loaded must not be what the model was built with.
    model, trained, optimizer = build(engine, world, seed=0 if first else 100 + steps.start, dtype=dtype)
    shapes = _shapes(dtype)
    if first:
        model.count.copy_(torch.tensor([1.0, 2.0, 3.0]) + 10 * rank)  # the first rank's is kept
        model.batches.fill_(7)
        for group in optimizer.param_groups:
            group["lr"] = LR
    else:
        found = checkpoint.load(root, trained, optimizer)
        assert found.step == steps.start, found
        assert found.extra == {"scheduler": {"last_epoch": steps.start}, "samples": steps.start * 7}
        assert model.count.tolist() == [1.0, 2.0, 3.0]
    assert int(model.batches) == 7
    assert model.scratch.tolist() == [0.0, 0.0]
    advance(trained, optimizer, shapes, steps, rank // 2 if engine == "tp" else rank, dtype)
    extra = {"scheduler": {"last_epoch": steps.stop}, "samples": steps.stop * 7}
    path = checkpoint.save(root, trained, optimizer, extra if rank == 0 else None)
    assert path.name == f"step_{steps.stop:08d}", path
    if engine in ZERO:
        return full_weights(trained, model)
    return whole(trained)


def expected(legs: list[tuple[str, int, range]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of the dense reference after the same steps, undisturbed."""
    model, shapes = Model().to(dtype), _shapes(dtype)
    weights = {name: p for name, p in model.named_parameters() if name in shapes}
    ranks = {name: r for name, r in low_rank(model, 3).items() if name in shapes}
    draw = torch.float64 if dtype == torch.float64 else torch.float32
    reference = Reference(weights, ranks, lr=LR, update_proj_gap=GAP, seed=5, weight_decay=0.1, draw_dtype=draw)
    for engine, world, steps in legs:
        for step in steps:
            reference.step(mean_gradients(shapes, step, world // 2 if engine == "tp" else world, dtype))
    frozen = {name: p.detach().double() for name, p in model.named_parameters() if name not in shapes}
    return {**reference.weights, **frozen}


def _shapes(dtype: torch.dtype) -> dict[str, torch.Size]:
    return shapes_of(Model().to(dtype))
