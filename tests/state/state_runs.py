"""Optimizer state dicts on the ranks of a test: asked for on one rank alone, and as torchtitan saves and loads them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from apollo_dist import APOLLO

from ..versions import MISSING_STATES
from .dcp_runs import OPTIONS, make, train, whole

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def message(work: Callable[[], object]) -> str:
    """The error that some work ends with."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return "no error"


def weights(model) -> list[torch.Tensor]:
    """This rank's part of the weights."""
    return [p.to_local().detach().clone() for p in model.parameters()]


def alone(rank: int, world: int, engine: str) -> dict[str, object]:
    """One rank asks for the state dict, copies it, saves and loads it, while the others do something else."""
    model, wrapped, optimizer = make(engine, world)
    train(model, wrapped, optimizer, range(3))
    found: dict[str, object] = {}
    # Rank 1 asks in the middle of nothing; the others go on to the barrier.
    asked = {}
    if rank == 1:
        asked = optimizer.state_dict()
        found["kinds"] = sorted({type(s["exp_avg"]).__name__ for s in asked["state"].values()})
        found["shown"] = {type(s["exp_avg"]).__name__ for s in optimizer.state.values()}
        repr(asked)
        copy.deepcopy(asked)
    dist.barrier()
    # Through a file of each rank, and back: the same bits as without.
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    kept = weights(model)
    train(model, wrapped, optimizer, range(3, 6))
    after = weights(model)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, w in zip(model.parameters(), kept, strict=True):
            p.to_local().copy_(w)
    optimizer.load_state_dict(loaded)
    found["held"] = any("held" in s for s in optimizer.state_dict()["state"].values())
    train(model, wrapped, optimizer, range(3, 6))
    found["same"] = all(torch.equal(a, b) for a, b in zip(weights(model), after, strict=True))
    # What differs is one error on all ranks, at load; and what one rank alone has is, too.
    state = optimizer.state_dict()
    other = make(engine, world)[2]
    seed = copy.deepcopy(state["param_groups"])
    seed[0]["seed"] = 9 if rank == 1 else OPTIONS["seed"]
    found["seed on rank 1"] = message(lambda: other.load_state_dict({**state, "param_groups": seed}))
    cut = {i: s for i, s in state["state"].items() if i or rank != 1}
    found["missing on rank 1"] = message(lambda: other.load_state_dict({**state, "state": cut}))
    steps = {i: {**s, "step": s["step"] + rank} for i, s in state["state"].items()}
    found["steps differ"] = message(lambda: other.load_state_dict({**state, "state": steps}))
    found["still new"] = not other.state
    return found


class Container:
    """Optimizers of a model's parts as torchtitan's ``OptimizersContainer`` keeps, saves and loads them."""

    def __init__(self, parts, optimizers) -> None:
        self.parts, self.optimizers = parts, optimizers

    def state_dict(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            found.update(get_optimizer_state_dict(part, optimizer, options=FLAT))
        return found

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=FLAT)


class Weights:
    """The model's weights, as torchtitan keeps them."""

    def __init__(self, model) -> None:
        self.model = model

    def state_dict(self):
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict) -> None:
        set_model_state_dict(self.model, state_dict)


def titan(rank: int, world: int, folder: str) -> dict[str, object]:
    """Save while training goes on, resume from it, and compare with the run that was never stopped."""
    found: dict[str, object] = {}
    model, wrapped, optimizer = make("fsdp2", world)
    train(model, wrapped, optimizer, range(3))
    states = {"model": Weights(wrapped), "optimizer": Container([wrapped], [optimizer])}
    flat = states["optimizer"].state_dict()
    found["held"] = any(key.endswith(".held") for key in flat)
    found["names"] = sum(key.endswith(".param_names") for key in flat)
    pending = dcp.async_save(states, checkpoint_id=f"{folder}/titan", process_group=dist.new_group(backend="gloo"))
    train(model, wrapped, optimizer, range(3, 6))  # must not reach into what is being saved
    pending.result()
    after, moments = weights(model), optimizer.state_dict()["state"]

    model, wrapped, optimizer = make("fsdp2", world, seed=1)
    states = {"model": Weights(wrapped), "optimizer": Container([wrapped], [optimizer])}
    dcp.load(states, checkpoint_id=f"{folder}/titan")
    train(model, wrapped, optimizer, range(3, 6))
    found["weights"] = all(torch.equal(a, b) for a, b in zip(weights(model), after, strict=True))
    pairs = [(s[k], moments[i][k]) for i, s in optimizer.state_dict()["state"].items() for k in s]
    found["moments"] = all(torch.equal(whole(a), whole(b)) for a, b in pairs)
    found["count"] = len(pairs)

    # Some states are not in the checkpoint: those parameters start anew, the others go on.
    flat = states["optimizer"].state_dict()
    lost = "layers.1.linear.weight"
    cut = {key: value for key, value in flat.items() if not MISSING_STATES or not key.startswith(f"state.{lost}.")}
    model, wrapped, optimizer = make("fsdp2", world, seed=1)
    set_optimizer_state_dict(wrapped, optimizer, cut, options=FLAT)
    state = get_optimizer_state_dict(wrapped, optimizer)["state"]
    found["lost"] = sorted({name for name, _ in model.named_parameters()} - set(state))
    train(model, wrapped, optimizer, range(6, 7))
    state = get_optimizer_state_dict(wrapped, optimizer)["state"]
    found["then"] = sorted({float(s["step"]) for s in state.values()})

    # Another seed is an error, on all ranks.
    other = APOLLO(optimizer.param_groups, **OPTIONS)
    other.seed = 8
    found["seed"] = message(lambda: set_optimizer_state_dict(wrapped, other, flat, options=FLAT))
    return found


def quietly(rank: int, world: int, folder: str) -> dict[str, object]:
    """``titan`` without the warnings of torch's checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return titan(rank, world, folder)
