"""Runs for ``test_changes.py``: a model of which parts are frozen, trained, and frozen again, on every engine."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO, checkpoint, layerwise

from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..reference import Reference
from ..sharded import fsdp1, whole

GAP, STEPS, SAVED = 3, 12, 7
# First and last step, both included, in which parameters whose names start so are frozen. A tall, a wide and a tiny
# matrix, experts, a norm, an embedding; from the start on, later, again and again.
FROZEN = {
    "layers.0.": [(0, 2)],
    "layers.1.linear.weight": [(0, 4), (8, 9)],
    "layers.7.": [(0, 3)],
    "layers.8.": [(0, 1), (6, 7)],
    "layers.3.": [(4, 6)],
    "layers.5.norm": [(2, 3), (6, 8)],
    "embed.": [(0, 5), (10, 11)],
    "layers.2.": [(0, 20)],
}


def is_frozen(name: str, step: int) -> bool:
    return any(name.startswith(p) and any(a <= step <= b for a, b in spans) for p, spans in FROZEN.items())


def plain_name(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def freeze(model: nn.Module, step: int) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(plain_name(name), step))


def wrap(model: nn.Module, engine: str, world: int) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if engine.startswith("fsdp1"):
        return fsdp1(model, engine.removeprefix("fsdp1 "), world)
    if engine in ("fsdp2", "hsdp", "inside"):
        shape, names = ((2, world // 2), ("replicate", "shard")) if engine == "hsdp" else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def groups_with_frozen(model: nn.Module, ranks: dict[str, int]) -> list[dict[str, Any]]:
    kept = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    groups = groups_of(model, ranks)
    for p, before in zip(model.parameters(), kept, strict=True):
        p.requires_grad_(before)
    return groups


def train(rank: int, world: int, engine: str, folder: str | None, to_none: bool = True) -> dict[str, float]:
    """Each weight's error against the reference, which skips what is frozen; with a checkpoint and a new model."""
    inside = engine.startswith("inside")
    ranks = low_rank(Bag(), 3)
    common = {"update_proj_gap": GAP, "seed": 5, "weight_decay": 0.1}
    reference = Reference(dict(Bag().double().named_parameters()), ranks, **common)

    def build(seed: int, step: int):
        model = Bag(seed).double()
        freeze(model, step)
        wrapped = wrap(model, engine, world)
        groups = groups_with_frozen(wrapped if engine.startswith("fsdp1") else model, ranks)
        if inside:
            return model, wrapped, layerwise.attach(wrapped, groups, **common)
        return model, wrapped, APOLLO(groups, model=wrapped, **common)

    model, wrapped, optimizer = build(0, 0)
    for step in range(STEPS):
        if step == SAVED and folder is not None:
            checkpoint.save(folder, wrapped, optimizer)
            model, wrapped, optimizer = build(9, 0)  # as a script starts, which has not come to thaw anything
            checkpoint.load(folder, wrapped, optimizer)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        freeze(model, step)
        if engine == "ddp" and before != {n: p.requires_grad for n, p in model.named_parameters()}:
            wrapped = wrap(model, engine, world)  # DDP averages what was trainable when it was built
        used = {plain_name(n): s for n, s in shapes_of(Bag()).items() if not is_frozen(plain_name(n), step)}
        optimizer.zero_grad(set_to_none=to_none)
        wrapped(gradients(used, step, rank)).backward()
        optimizer.step()
        reference.step(mean_gradients(used, step, world))
    state = optimizer.named_state()
    assert not any(name.startswith("layers.2.") for name in state), "a parameter that never trained has state"
    return {n: relative_error(w, reference.weights[n]) for n, w in whole(wrapped).items()}


def ddp_built_while_frozen(rank: int, world: int) -> str:
    """The error when DDP does not average the gradients of what trains later."""
    model = Bag().double()
    model.layers[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = APOLLO(model, rank=1)
    shapes = shapes_of(Bag())
    for step in range(2):
        if step:
            model.layers[0].requires_grad_(True)
        used = {n: s for n, s in shapes.items() if step or not n.startswith("layers.0.")}
        optimizer.zero_grad()
        wrapped(gradients(used, step, rank)).backward()
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    return "no error"


def options_between_steps(rank: int, world: int, engine: str) -> dict[str, float]:
    """Options of a group change, also those that the exchange depends on; states stay with their owners."""
    model, ranks = Bag().double(), low_rank(Bag(), 3)
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP)
    wrapped = wrap(model, engine, world)
    optimizer = APOLLO(groups_of(wrapped, ranks), model=wrapped, update_proj_gap=GAP)
    shapes = shapes_of(Bag())
    changes: dict[int, tuple[str, Any]] = {
        2: ("scale_type", "tensor"), 4: ("disable_nl", True), 5: ("update_proj_gap", 1), 7: ("scale_type", "channel"),
    }  # fmt: skip
    for step in range(9):
        if step in changes:
            key, value = changes[step]
            for group in optimizer.param_groups:
                group[key] = value
            setattr(reference, {"update_proj_gap": "gap"}.get(key, key), value)
        optimizer.zero_grad()
        wrapped(gradients(shapes, step, rank)).backward()
        optimizer.step()
        reference.step(mean_gradients(shapes, step, world))
    return {n: relative_error(w, reference.weights[n]) for n, w in whole(wrapped).items()}


def replaced(rank: int, world: int) -> dict[str, float]:
    """``load_state_dict(assign=True)`` of a model under FSDP2 between steps: followed on every rank."""
    model, ranks = Bag().double(), low_rank(Bag(), 3)
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP)
    wrapped = wrap(model, "fsdp2", world)
    optimizer = APOLLO(groups_of(wrapped, ranks), model=wrapped, update_proj_gap=GAP)
    shapes = shapes_of(Bag())
    for step in range(5):
        if step == 2:
            model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()}, assign=True)
        optimizer.zero_grad()
        wrapped(gradients(shapes, step, rank)).backward()
        optimizer.step()
        reference.step(mean_gradients(shapes, step, world))
    return {n: relative_error(w, reference.weights[n]) for n, w in whole(wrapped).items()}


def bytes_of_frozen(rank: int, world: int, engine: str) -> tuple[int, int]:
    """Bytes of state, and bytes sent a step, with a layer that was left out, and with one that is frozen."""
    found = []
    for left_out in (True, False):
        model = Bag().double()
        model.layers[0].requires_grad_(False)
        wrapped = wrap(model, engine, world)
        ranks = low_rank(Bag(), 3)
        optimizer = APOLLO(groups_of(wrapped, ranks) if left_out else groups_with_frozen(wrapped, ranks), model=wrapped)
        wrapped(gradients(shapes_of(model), 0, rank)).backward()
        optimizer.step()
        (plan,) = optimizer._parts.plans.built.values()
        found.append((optimizer.state_bytes(), [g.exchange.bytes_sent for g in plan.shard_groups]))
    return found[0], found[1]


def cases(rank: int, world: int, engines: tuple[str, ...], folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {e: train(rank, world, e, f"{folder}/{e}") for e in engines}
    found |= {f"{e}, zeros": train(rank, world, e, None, False) for e in engines if e in ("plain", "fsdp2")}
    if world > 1:
        found["ddp frozen"] = ddp_built_while_frozen(rank, world)
        found["options, fsdp2"] = options_between_steps(rank, world, "fsdp2")
        found["replaced, fsdp2"] = replaced(rank, world)
        found["bytes"] = bytes_of_frozen(rank, world, "fsdp2")
    return found
