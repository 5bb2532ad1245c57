"""Training, and saving and loading by ``torch.distributed.checkpoint``, on the ranks of a test."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO

from ..models import SHAPES, Bag, gradients, groups_of, low_rank, relative_error, shapes_of
from ..reference import Reference
from ..sharded import fsdp2, tp

# The last ones have columns that 2 and 4 ranks divide evenly, as FSDP2 wants on dim 1.
ALL = [*SHAPES.values(), (16, 4), (6, 24), (8, 8)]
OPTIONS = {"update_proj_gap": 4, "seed": 3, "weight_decay": 0.1}


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def make(engine: str, world: int, seed: int = 0) -> tuple[Bag, nn.Module, APOLLO]:
    """A double-precision Bag, the same as it is wrapped, and its optimizer."""
    model = Bag(seed, shapes=ALL).double()
    ranks = low_rank(model, 3)
    wrapped: nn.Module = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    elif engine.startswith("tp "):
        wrapped = tp(model, engine.removeprefix("tp "), world)
    elif engine != "plain":
        wrapped = fsdp2(model, engine.removeprefix("fsdp2").strip(), world)
    return model, wrapped, APOLLO(groups_of(wrapped, ranks), **OPTIONS)


def train(model: Bag, wrapped: nn.Module, optimizer: APOLLO, steps: range) -> None:
    """Steps with the same gradients on every rank, so that the number of ranks does not matter."""
    shapes = shapes_of(model)
    for step in steps:
        wrapped(gradients(shapes, step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def expected(steps: int) -> Reference:
    """The reference after that many steps."""
    model = Bag(shapes=ALL).double()
    reference = Reference(dict(model.named_parameters()), low_rank(model, 3), **OPTIONS)
    for step in range(steps):
        reference.step(gradients(shapes_of(model), step, 0))
    return reference


def errors(model: Bag, optimizer: APOLLO, steps: int) -> dict[str, float]:
    """Of the weights against the reference, and of the moments that ``state_dict`` shows, in whole."""
    reference, ranks = expected(steps), low_rank(model, 3)
    found = {n: relative_error(whole(p), reference.weights[n]) for n, p in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    for index, state in optimizer.state_dict()["state"].items():
        name = order[index]
        assert state["step"] == steps, (name, state["step"])
        for key, table in (("exp_avg", reference.M), ("exp_avg_sq", reference.V)):
            shape = reference.weights[name].shape
            matrices = [f"{name}[{e}]" for e in range(shape[0])] if len(shape) == 3 else [name]
            parts = [table[m] if m in table else torch.zeros(()) for m in matrices]
            if name in ranks and shape[-2] < shape[-1]:
                parts = [part.T for part in parts]
            wanted = torch.cat(parts) if len(parts) > 1 else parts[0]
            value = whole(state[key])
            assert value.shape == wanted.shape, (name, key, value.shape, wanted.shape)
            found[f"{name}/{key}"] = relative_error(value, wanted) if wanted.numel() else 0.0
    return found


def save(wrapped: nn.Module, optimizer: APOLLO, folder: str, options: StateDictOptions, how: str = "dcp") -> None:
    """Save a checkpoint with DCP, or with ``torch.save`` on the first rank."""
    weights, state = get_state_dict(wrapped, optimizer, options=options)
    if how == "dcp":
        _quiet(lambda: dcp.save({"model": weights, "optim": state}, checkpoint_id=folder))
    else:
        if dist.get_rank() == 0:
            torch.save({"model": weights, "optim": state}, f"{folder}.pt")
        dist.barrier()


def load(
    engine: str, world: int, folder: str, steps: range, options: StateDictOptions, how: str = "dcp"
) -> tuple[Bag, nn.Module, APOLLO, dict[str, float]]:
    """A model of other weights that takes over a checkpoint and trains on; errors at once and after the steps."""
    model, wrapped, optimizer = make(engine, world, seed=1)
    weights, state = {}, {}
    if how == "dcp":
        weights, state = get_state_dict(wrapped, optimizer, options=options)
        _quiet(lambda: dcp.load({"model": weights, "optim": state}, checkpoint_id=folder))
    elif not options.broadcast_from_rank0 or dist.get_rank() == 0:
        loaded = torch.load(f"{folder}.pt", weights_only=True)
        weights, state = loaded["model"], loaded["optim"]
    # Not set_state_dict, which takes an empty dictionary on one rank, to be broadcast into, for none to set.
    set_optimizer_state_dict(wrapped, optimizer, optim_state_dict=state, options=options)
    of_weights = StateDictOptions(full_state_dict=how == "torch", broadcast_from_rank0=options.broadcast_from_rank0)
    set_model_state_dict(wrapped, weights, options=of_weights)
    at_once = errors(model, optimizer, steps.start)
    train(model, wrapped, optimizer, steps)
    later = errors(model, optimizer, steps.stop)
    found = {f"{when}: {n}": e for when, each in (("at once", at_once), ("later", later)) for n, e in each.items()}
    return model, wrapped, optimizer, found


def _quiet(work) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        work()
