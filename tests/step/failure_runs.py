"""Failures injected into one rank's local work, and what every rank sees of them; used by ``test_failures.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO, RankError
from apollo_dist.distributed import gather
from apollo_dist.exchange import collectives
from apollo_dist.kernels import tuned
from apollo_dist.optimizers import following
from apollo_dist.rules import adamw
from apollo_dist.sharding import detect, dtensor
from apollo_dist.state import slots
from apollo_dist.step import nonfinite, plan, run, shard_group
from apollo_dist.step.matrix import Matrix

from ..engines import full_weights, initialize, prepare, zero_config
from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..reference import Reference
from ..sharded import fsdp1, fsdp2, tp, whole
from ..timeouts import allowed

SHAPES = [(24, 6), (6, 24), (8, 8), (13, 4)]
RANK, GAP = 3, 2
OPTIONS = {"seed": 5, "weight_decay": 0.1}
STEPS = 3

# What is called in a first step, where it stands, and at which call of it the injected error is raised.
Place = tuple[Any, str, int]


class _Torch:
    """torch as one module sees it, of which a function can fail there alone."""

    zeros = staticmethod(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


TORCH = _Torch()

# Before the step: nothing is kept of it.
BUILDING: dict[str, Place] = {
    "following the model": (following.Following, "before_plan", 1),
    "looking for groups of ranks": (dtensor, "_needed", 1),
    "reading layouts": (detect, "read", 1),
    "choosing": (plan, "rule_of", 2),
    "planning": (shard_group, "make_plan", 1),
    "making states": (shard_group, "ready", 3),
    "allocating a moment": (TORCH, "zeros", 2),
    "dividing into batches": (shard_group, "make_batches", 1),
    "comparing facts": (plan, "fingerprint", 1),
}
# In the step, before any weight changes: the states are made new again.
STEPPING: dict[str, Place] = {
    "looking for NaN": (nonfinite, "not_finite", 1),
    "counting the step": (Matrix, "begin_step", 2),
    "projecting": (run, "partials", 1),
    "packing exchange 1": (collectives, "packed", 1),
    "unpacking exchange 1": (collectives.Arrivals, "of", 1),
    "the owners' step": (run, "own", 1),
    "packing exchange 2": (collectives, "_part", 2),
}
# Where weights change: the optimizer refuses to go on.
CHANGING: dict[str, Place] = {
    "updating weights": (run, "apply", 1),
    "updating a later matrix": (tuned, "apply_one", 2),
    "AdamW": (adamw, "adam_step", 1),
}
NOT_REACHED = "not reached"
KINDS = (torch.OutOfMemoryError, KeyboardInterrupt, TypeError, ValueError)


@contextmanager
def failing(place: Place, error: BaseException | None) -> Iterator[list[int]]:
    """Raise ``error`` at a place; yields a list that has an entry once it was raised. None injects nothing."""
    owner, name, wanted = place
    original = getattr(owner, name)
    calls, raised = [0], list[int]()

    def injected(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if error is not None and calls[0] == wanted:
            raised.append(1)
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, injected)
    try:
        yield raised
    finally:
        setattr(owner, name, original)


def attempt(work: Callable[[], Any], place: Place, culprit: int, kind: type[BaseException], rank: int) -> str:
    """What this rank sees of work that fails on ``culprit``: "" if all is as it should be, else what is wrong."""
    error = kind(f"injected into {place[1]}")
    began = time.monotonic()
    seen: BaseException | None = None
    with failing(place, error if rank == culprit else None) as raised:
        try:
            work()
        except BaseException as caught:
            seen = caught
    seconds = time.monotonic() - began
    if not gather(bool(raised))[culprit]:
        return NOT_REACHED if seen is None else f"{type(seen).__name__}: {seen}"
    if seconds > allowed(20):
        return f"took {seconds:.0f} s"
    if seen is None:
        return "nothing was raised"
    if rank == culprit:
        return "" if seen is error else f"{type(seen).__name__} on the rank that failed: {seen}"
    words = f"rank {culprit}: {kind.__name__}: injected into {place[1]}"
    as_it_should = type(seen) is RankError and seen.rank == culprit and str(seen) == words
    return "" if as_it_should else f"{type(seen).__name__} on another rank: {seen}"


class Native:
    """A model that PyTorch wraps, its optimizer, and the reference of both."""

    def __init__(self, layout: str, rank: int, world: int) -> None:
        model = Bag(shapes=SHAPES).double()
        self.shapes = shapes_of(model)
        ranks = low_rank(model, RANK)
        self.reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP, **OPTIONS)
        self.model = _wrapped(layout, model, world)
        # Ranks of a tensor-parallel pair, and whole models that nothing averages, work on the same data.
        self.data, self.copies = {"tp": (rank // 2, world // 2), "plain": (0, 1)}.get(layout, (rank, world))
        groups = groups_of(self.model, ranks)
        more = {"model": self.model, "skip_nonfinite": True}
        self.optimizer = APOLLO(groups, update_proj_gap=GAP, **more, **OPTIONS)
        self.steps = 0

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(gradients(self.shapes, self.steps, self.data)).backward()

    def step(self) -> None:
        self.optimizer.step()

    def stepped(self) -> None:
        self.reference.step(mean_gradients(self.shapes, self.steps, self.copies))
        self.steps += 1

    def error(self) -> float:
        found = whole(self.model)
        return max(relative_error(found[name], self.reference.weights[name]) for name in self.shapes)


class DeepSpeed(Native):
    """The same under ZeRO, in float32; in one parameter group, so that an engine's step is one call of ours."""

    def __init__(self, layout: str, rank: int, world: int, *, in_groups: bool = False) -> None:
        prepare()
        self.module = Bag(shapes=SHAPES)
        self.shapes = shapes_of(self.module)
        ranks = low_rank(self.module, RANK)
        start = dict(self.module.named_parameters())
        self.reference = Reference(start, ranks, update_proj_gap=GAP, draw_dtype=torch.float32, **OPTIONS)
        self.data, self.copies, self.steps = rank, world, 0
        given = groups_of(self.module, ranks) if in_groups else self.module
        self.optimizer = APOLLO(given, rank=RANK, update_proj_gap=GAP, **OPTIONS)
        self.model = initialize(self.module, zero_config(int(layout[-1])), optimizer=self.optimizer)
        self.groups = self.optimizer.param_groups
        self.tensors = [list(group["params"]) for group in self.groups]

    def backward(self) -> None:
        # DeepSpeed exchanges the groups for a step and does not put them back after an error.
        self.optimizer.param_groups = self.groups
        for group, tensors in zip(self.groups, self.tensors, strict=True):
            group["params"] = tensors
        wrapper = self.model.optimizer
        wrapper.zero_grad()
        if hasattr(wrapper, "all_grad_tensors"):  # stages 1 and 2 would add to the gradients of the step that failed
            wrapper.all_grad_tensors, wrapper.averaged_gradients = {}, {}
        self.model.backward(self.model(gradients(self.shapes, self.steps, self.data, torch.float32)))

    def step(self) -> None:
        self.model.step()

    def stepped(self) -> None:
        self.reference.step(mean_gradients(self.shapes, self.steps, self.copies, torch.float32))
        self.steps += 1

    def error(self) -> float:
        found = full_weights(self.model, self.module)
        return max(relative_error(found[name], self.reference.weights[name]) for name in self.shapes)


def _wrapped(layout: str, model: nn.Module, world: int) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp1":
        return fsdp1(model, "full", world)
    if layout == "fsdp2":
        return fsdp2(model, "", world)
    if layout == "tp":
        return tp(model, "alternating", world)
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    assert layout == "plain"
    return model


def first_steps(rank: int, world: int, layouts: list[str]) -> dict[str, tuple[dict[str, str], set[str], float]]:
    """By layout: what went wrong by place and rank, the places that were reached, and the error of the weights."""
    return {layout: first_step(rank, world, layout) for layout in layouts}


def first_step(rank: int, world: int, layout: str) -> tuple[dict[str, str], set[str], float]:
    build = DeepSpeed if layout.startswith("zero") else Native
    wrong: dict[str, str] = {}
    reached: set[str] = set()
    slots.torch = TORCH  # type: ignore[attr-defined]
    run = build(layout, rank, world)
    number = 0
    for phase in (CHANGING, BUILDING, STEPPING):
        for name, place in phase.items():
            for culprit in range(world):
                run.backward()
                found = attempt(run.step, place, culprit, KINDS[number % len(KINDS)], rank)
                number += 1
                if rank == culprit and found != NOT_REACHED:
                    reached.add(name)
                if found and found != NOT_REACHED:
                    wrong[f"{name} on rank {culprit}"] = found
                if phase is CHANGING and not found:
                    run.backward()
                    refused = _message(run.step)
                    if "failed half way" not in refused:
                        wrong[f"{name} on rank {culprit}, the next step"] = refused
                # Weights have changed: on all ranks alike, or on some.
                if found == NOT_REACHED or phase is CHANGING:
                    run = build(layout, rank, world)
    for _ in range(STEPS):
        run.backward()
        run.step()
        run.stepped()
    if build is DeepSpeed:
        wrong |= _in_groups(layout, rank, world)
    return wrong, reached, run.error()


def _in_groups(layout: str, rank: int, world: int) -> dict[str, str]:
    """A failure in the second group's call, when the first group has been stepped: nothing goes on."""
    run = DeepSpeed(layout, rank, world, in_groups=True)
    run.backward()
    found = attempt(run.step, BUILDING["planning"], 1, torch.OutOfMemoryError, rank)
    run.backward()
    said = _message(run.step)
    wrong = {"planning the second group": found, "after that": "" if "failed half way" in said else said}
    return {key: text for key, text in wrong.items() if text}


def later_steps(rank: int, world: int) -> dict[str, str]:
    """What is wrong with failures after the first step, by place: a rank that waits is told, and nobody goes on.

    Each place has process groups of its own, for the collective that a rank failed in stays unfinished.
    """
    wrong = {}
    for number, (name, place) in enumerate({**STEPPING, **CHANGING}.items()):
        if name in ("looking for NaN", "unpacking exchange 1"):
            continue
        group = dist.new_group(list(range(world)))
        # Equal meshes would be taken for each other, and so would their groups.
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"mesh_{number}",))
        model = Bag(shapes=SHAPES).double()
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        shapes = shapes_of(model)
        optimizer = APOLLO(groups_of(model, low_rank(model, RANK)), process_group=group, **OPTIONS)
        for step in range(2):
            optimizer.zero_grad()
            model(gradients(shapes, step, rank)).backward()
            if step == 0:
                optimizer.step()
        found = attempt(optimizer.step, place, 1, torch.OutOfMemoryError, rank)
        if found == "nothing was raised":
            # After the last exchange of a step the others need not wait for the one that failed until the next step.
            found = _heard_later(optimizer, place)
        if found:
            wrong[name] = found
        if "failed half way" not in (said := _message(optimizer.step)):
            wrong[f"{name}, the next step"] = said
    return wrong


def _heard_later(optimizer: APOLLO, place: Place) -> str:
    try:
        optimizer.step()
    except RankError as error:
        words = f"rank 1: OutOfMemoryError: injected into {place[1]}"
        return "" if str(error) == words else str(error)
    return "nothing was raised in the next step either"


def _message(work: Callable[[], Any]) -> str:
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return "no error"
