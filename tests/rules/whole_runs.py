"""Rules that need whole matrices, on the ranks of a test: traffic, failures, gradients that say little."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from apollo_dist import RankError, checkpoint
from apollo_dist.distributed import gather
from apollo_dist.exchange import whole as exchange
from apollo_dist.planning.estimate import estimate_rule
from apollo_dist.projections import orthonormal
from apollo_dist.selection.roles import of_model

from ..engines import full_weights, initialize, prepare, zero_config
from ..exchange.test_exchange import Counter
from ..models import gradients, mean_gradients, relative_error, shapes_of
from ..sharded import fsdp2, whole
from .problems import CASES, Llama
from .table_runs import Run

TRAFFIC = ("GaLore", "Fira", "GaLore SVD", "Fira SVD bf16", "Muon", "Muon bf16")


def traffic(rank: int, world: int) -> dict[str, Any]:
    """By rule: (collectives, bytes sent) of a step of refresh and of the next, and what was predicted of both."""
    found = {}
    for rule in TRAFFIC:
        case, model = CASES[rule], Llama()
        shapes = shapes_of(model)
        low = {}
        if "rank" in case.options:
            low["low_rank"] = [n for n, s in shapes.items() if case.form(n, s)[0] == "low_rank"]
        predicted = estimate_rule(
            {name: tuple(shape) for name, shape in shapes.items()},
            case.rule, world=world, layout="fsdp2", roles=of_model(model), **low, **case.options,
        )  # fmt: skip
        wrapped = fsdp2(model, "", world)
        optimizer = case.optimizer(wrapped)
        counted = []
        for step in range(5):  # with 3 steps from one refresh to the next
            wrapped(gradients(shapes, step, rank)).backward()
            with Counter(rank) as counter:
                optimizer.step()
            counted.append((len(counter.calls), sum(counter.bytes)))
            optimizer.zero_grad()
        wanted = (predicted.collectives, predicted.exchange_bytes[rank], predicted.refresh_bytes[rank])
        found[rule] = counted[3:], wanted
    return found


class Breaking:
    """``torch.linalg`` of which ``eigh`` fails."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.linalg, name)

    def eigh(self, *_: Any) -> Any:
        raise torch.linalg.LinAlgError("injected: the algorithm did not converge")


class Torch:
    """torch with that."""

    linalg = Breaking()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def failures(rank: int, world: int) -> list[str]:
    """What each rank sees of an SVD that fails on rank 1 in a later refresh, and of NaN in a first step."""
    case = CASES["GaLore SVD"]
    seen = []
    # A group of its own, for the collective in which a rank fails stays unfinished.
    group = dist.new_group(list(range(world)))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("failing",))
    wrapped = Llama().double()
    for block in wrapped.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    shapes = shapes_of(Llama())
    optimizer = case.make(wrapped, lr=0.02, **case.options, skip_nonfinite=True, process_group=group)
    for step in range(4):
        grads = gradients(shapes, step, rank)
        if step == 0 and rank == 1:
            grads["layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        wrapped(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    seen.append("skipped")
    wrapped(gradients(shapes, 4, rank)).backward()
    if rank == 1:
        orthonormal.torch = Torch()  # type: ignore[assignment]
    try:
        optimizer.step()
        seen.append("nothing")
    except (RankError, RuntimeError) as error:
        seen.append(f"{type(error).__name__}: {error}")
    finally:
        orthonormal.torch = torch
    return seen


def nan_without_skipping(rank: int, world: int) -> str:
    wrapped = fsdp2(Llama().double(), "", world)
    shapes = shapes_of(Llama())
    case = CASES["Fira SVD"]
    optimizer = case.make(wrapped, lr=0.02, **case.options)
    wrapped({name: torch.full_like(grad, float("nan")) for name, grad in gradients(shapes, 0, rank).items()}).backward()
    try:
        optimizer.step()
    except (RankError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def degenerate(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """Zero, of rank one, with equal or nearly equal singular values, by turns."""
    generator = torch.Generator().manual_seed(step)
    m, n = shape[-2:]
    kind = (sum(map(ord, name)) + step // 3) % 4
    one = torch.eye(m, n, dtype=torch.float64)
    if kind == 0:
        one = torch.zeros(m, n, dtype=torch.float64)
    elif kind == 1:
        one = torch.outer(torch.randn(m, generator=generator).double(), torch.randn(n, generator=generator).double())
    elif kind == 2:
        one = one * (1 + 1e-15 * torch.arange(n))
    return one.expand(shape).clone()


def degenerates(rank: int, world: int) -> dict[str, Any]:
    """By rule the weights after steps of such gradients, and how far from orthonormal projections are."""
    found = {}
    for rule in ("GaLore SVD", "Fira SVD", "APOLLO SVD"):
        for r in (3, 4):
            case = CASES[rule]
            wrapped = fsdp2(Llama().double(), "", world)
            shapes = shapes_of(Llama())
            optimizer = case.make(wrapped, lr=0.02, **{**case.options, "rank": r})
            for step in range(7):
                grads = gradients(shapes, step, rank)
                matrices = {n: s for n, s in shapes.items() if len(s) > 1}
                grads |= {name: degenerate(name, shape, step) for name, shape in matrices.items()}
                wrapped(grads).backward()
                optimizer.step()
                optimizer.zero_grad()
            kept = {name: slot["projection"] for name, slot in optimizer.named_state().items() if "projection" in slot}
            off = max(float((P.T @ P - torch.eye(r)).abs().max()) for P in kept.values() if len(P))
            sums = {name: [float(P.sum()) for P in each if len(P)] for name, each in _by_name(gather(kept)).items()}
            same = all(len(set(each)) == 1 for each in sums.values())
            found[f"{rule} {r}"] = whole(wrapped), off, same
    return found


def _by_name(each: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [kept[name] for kept in each] for name in each[0]}


def many_rounds(rank: int, world: int) -> dict[str, float]:
    """Muon and GaLore, with rounds of one matrix of an owner: the largest error."""
    before = exchange.ROUND
    exchange.ROUND = 1
    errors = {}
    try:
        for rule in ("Muon", "GaLore SVD"):
            run = Run(rule, "fsdp1 one flat", world)
            run.train(range(4), rank)
            errors[rule] = max(run.errors().values())
    finally:
        exchange.ROUND = before
    return errors


def in_either_dtype(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    """Whole weights after steps of Muon with iterations in bfloat16, matrices travelling so and in float32."""
    found = []
    for travels in ("auto", "state"):
        model = Llama()
        shapes, wrapped = shapes_of(model), fsdp2(model, "", world)
        optimizer = CASES["Muon"].make(wrapped, lr=0.02, exchange_dtype=travels)
        for step in range(3):
            wrapped(gradients(shapes, step, rank, torch.float32)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(whole(wrapped))
    return found


def long_runs(rank: int, world: int, folder: str) -> dict[str, float]:
    """25 steps with 8 refreshes, and a checkpoint in the middle of a gap that goes on in one process's layout.

    Where refreshes are spread, 22 steps and 4 more, inside backward.
    """
    errors = {}
    for rule in ("GaLore SVD", "Fira SVD", "APOLLO SVD", "Fira SVD bf16", "Muon", "GaLore subspace"):
        spread = rule == "GaLore subspace"
        run = Run(rule, "in backward" if spread else "fsdp2", world)
        middle = 22 if spread else 23
        run.train(range(middle), rank)
        checkpoint.save(f"{folder}/{rule}", run.wrapped, run.optimizer)
        run = Run(rule, "in backward" if spread else "ddp", world, copy.deepcopy(run.dense), seed=1)
        checkpoint.load(f"{folder}/{rule}", run.wrapped, run.optimizer)
        run.train(range(middle, middle + (4 if spread else 2)), rank)
        errors[rule] = max(run.errors().values())
    return errors


def leg(rank: int, world: int, rule: str, engine: str, folder: str, steps: range, dense: Any) -> tuple[Any, float]:
    """Go on from a checkpoint, if ``steps`` do not begin at 0, under another engine, in float32; the reference, and the
    largest error of the weights."""
    case, model = CASES[rule], Llama(seed=steps.start)
    dense = dense or case.dense(dict(model.named_parameters()), torch.float32)
    shapes = shapes_of(model)
    if engine.startswith("zero"):
        prepare()
        trained = initialize(model, zero_config(int(engine[-1])), optimizer=case.optimizer(model))
        target: tuple[Any, ...] = (trained,)
    else:
        trained = fsdp2(model, "", world) if engine == "fsdp2" else model
        target = (trained, case.optimizer(trained))
    if steps.start:
        checkpoint.load(folder, *target)
    for step in steps:
        loss = trained(gradients(shapes, step, rank, torch.float32))
        if engine.startswith("zero"):
            trained.backward(loss)
            trained.step()
        else:
            loss.backward()
            target[1].step()
            target[1].zero_grad()
        dense.step(mean_gradients(shapes, step, world, torch.float32))
    checkpoint.save(folder, *target)
    found = full_weights(trained, model) if engine.startswith("zero") else whole(trained)
    return dense, max(relative_error(found[name], wanted) for name, wanted in dense.weights.items())
