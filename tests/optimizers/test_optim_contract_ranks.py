"""The contract of a torch optimizer on several ranks: they skip and fail together; FSDP1's own path is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO, checkpoint

from ..models import Bag, gradients, groups_of, low_rank, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from ..sharded import fsdp1, whole


def build(world, engine="fsdp2", dtype=torch.float64, **options):
    model = Bag().to(dtype)
    ranks = low_rank(model, 3)
    if engine == "ddp":
        return model, DistributedDataParallel(model), APOLLO(groups_of(model, ranks), **options)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model, APOLLO(groups_of(model, ranks), **options)


def give(model, wrapped, step, sign=1.0):
    """A backward pass with gradients that are the same on every rank."""
    given = gradients(shapes_of(model), step, 0)
    wrapped({name: sign * grad for name, grad in given.items()}).backward()
    return given


def worst(model, reference):
    return max(relative_error(p, reference.weights[name]) for name, p in whole(model).items())


# What may change from step to step.


def options_that_change(rank, world):
    """Errors with a tensor lr that changes, and with maximize."""
    found = {}
    for engine in ("fsdp2", "ddp"):
        lr = torch.tensor(0.02, dtype=torch.float64)
        model, wrapped, optimizer = build(world, engine, lr=lr, weight_decay=0.1, maximize=True)
        start = whole(model)
        reference = Reference(start, low_rank(Bag(), 3), weight_decay=0.1)
        for step in range(4):
            reference.lr = 0.02 * 0.5**step
            given = give(model, wrapped, step)
            optimizer.step()
            optimizer.zero_grad()
            reference.step({name: -grad for name, grad in given.items()})
            lr.mul_(0.5)
        found[engine] = worst(model, reference)
    return found


def test_tensor_lr_and_maximize():
    for found in run_ranks(options_that_change, 2):
        assert max(found.values()) < 1e-9, found


def scaled(rank, world):
    """GradScaler, with an infinity that one rank alone holds, in its part of a gradient."""
    model, wrapped, optimizer = build(world, dtype=torch.float32, lr=0.01)
    reference = Reference(whole(model), low_rank(Bag(), 3), lr=0.01, draw_dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    scales = []
    for step in range(4):
        given = give(model, wrapped, step, sign=scaler.get_scale())
        if step == 2 and rank == 1:
            model.layers[0].linear.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        if step != 2:
            reference.step({name: grad.float() for name, grad in given.items()})
    return scales, worst(model, reference)


def test_grad_scaler_skips_on_every_rank():
    for scales, error in run_ranks(scaled, 2):
        assert scales == [1024.0, 1024.0, 512.0, 512.0]
        assert error < 1e-5


# One bad rank.


def bad_calls(rank, world):
    """Messages of calls that are wrong on rank 1 only, and of what cannot be loaded."""
    messages = {}

    def attempt(name, work):
        try:
            work()
            messages[name] = "no error"
        except ValueError as error:
            messages[name] = str(error)

    model, wrapped, optimizer = build(world)
    extra = nn.Parameter(torch.ones(4, 4))
    for step in range(2):
        give(model, wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    groups = len(optimizer.param_groups)
    attempt("bad group", lambda: optimizer.add_param_group({"params": [("extra", extra)], "rank": 9 if rank else 2}))
    attempt("other lr", lambda: optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.1 * (rank + 1)}))
    attempt("tensor lr", lambda: build(world, lr=torch.tensor(0.1 * (rank + 1))))
    assert len(optimizer.param_groups) == groups
    saved = optimizer.state_dict()
    cut = {**saved, "param_groups": saved["param_groups"][: groups - rank]}
    attempt("bad load", lambda: optimizer.load_state_dict(cut))

    # Judged at load, on all ranks alike; ranks that load different states find that out.
    other = build(world)
    state = copy.deepcopy(saved)
    first = next(i for i, s in state["state"].items() if "last_norm" in s)
    del state["state"][first]["exp_avg"]
    attempt("missing moment", lambda: other[2].load_state_dict(state if rank else saved))
    state = {**saved, "state": {i: s for i, s in saved["state"].items() if i != first or not rank}}
    attempt("nothing on one rank", lambda: other[2].load_state_dict(state))

    # After all that it goes on as if nothing had been.
    twin = build(world)
    for step in range(3):
        give(twin[0], twin[1], step)
        twin[2].step()
        twin[2].zero_grad()
    give(model, wrapped, 2)
    optimizer.step()
    same = [torch.equal(p, q) for p, q in zip(whole(model).values(), whole(twin[0]).values(), strict=True)]
    return messages, all(same)


def test_errors_are_raised_on_every_rank():
    expected = {
        "bad group": "rank 1: ValueError: rank 9 is larger than extra",
        "other lr": "ranks disagree: lr of parameter group",
        "tensor lr": "ranks disagree: lr of parameter group 0 is 0.1",
        "bad load": "rank 1: ValueError: the loaded state is of parameter groups with",
        "missing moment": "has step, last_norm, exp_avg_sq, and no exp_avg: it is of another optimizer",
        "nothing on one rank": "ranks disagree: loaded state of",
    }
    results = run_ranks(bad_calls, 2)
    for messages, same in results:
        assert same
        for name, text in expected.items():
            assert text.removeprefix("rank 1: ValueError: ") in messages[name], (name, messages[name])
    # The rank that fails raises its own error, and the other one says whose it is.
    first, second = (messages for messages, _ in results)
    assert {name: text.removeprefix("rank 1: ValueError: ") for name, text in first.items()} == second
    assert all(first[name].startswith("rank 1: ") for name, text in expected.items() if text.startswith("rank 1: "))


# FSDP1.


def flattened(rank, world, folder):
    """What every way to FSDP1's optimizer state dict says, and that a checkpoint holds the state."""
    model = Bag().double()
    wrapped = fsdp1(model, "full", world)
    optimizer = APOLLO(wrapped, rank=1, exclude=None)
    assert optimizer.state_dict()["state"] == {}
    messages = {}
    for when in ("fresh", "trained"):
        if when == "trained":
            give_flat(wrapped, world)
            optimizer.step()
        for name, work in {
            "FSDP.optim_state_dict": lambda: FullyShardedDataParallel.optim_state_dict(wrapped, optimizer),
            "given": lambda: FullyShardedDataParallel.optim_state_dict(wrapped, optimizer, optimizer.state_dict()),
            "get_optimizer_state_dict": lambda: get_optimizer_state_dict(wrapped, optimizer),
            "set_optimizer_state_dict": lambda: set_optimizer_state_dict(
                wrapped, optimizer, optim_state_dict={"state": {}, "param_groups": []}
            ),
            "full": lambda: FullyShardedDataParallel.full_optim_state_dict(wrapped, optimizer),
        }.items():
            try:
                messages[f"{name}, {when}"] = f"no error, {len(work()['state'])} states"
            except Exception as error:
                messages[f"{name}, {when}"] = f"{type(error).__name__}: {error}"
    checkpoint.save(folder, wrapped, optimizer, step=1)
    return messages


def give_flat(wrapped, world):
    shapes = {name: p.shape for name, p in whole(wrapped).items()}
    wrapped(gradients(shapes, 0, 0)).backward()


def test_fsdp1s_own_state_dict_is_refused(tmp_path):
    first, second = run_ranks(flattened, 2, str(tmp_path))
    assert first == second
    for name, message in first.items():
        if name.endswith("trained") and not name.startswith("set"):
            assert message.startswith("ValueError"), (name, message)
            assert "apollo_dist.checkpoint.save(folder, model, optimizer)" in message, name


# Copies of a sharded optimizer.


def pickled(rank, world):
    model, wrapped, optimizer = build(world)
    for step in range(3):
        give(model, wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="with a process_group cannot be pickled"):
        pickle.dumps(build(world, process_group=torch.distributed.group.WORLD)[2])
    other = copy.deepcopy(optimizer)
    give(model, wrapped, 3)
    ours, theirs = ([p for group in o.param_groups for p in group["params"]] for o in (optimizer, other))
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    return [torch.equal(p.to_local(), q.to_local()) for p, q in zip(ours, theirs, strict=True)]


def test_a_copy_of_a_sharded_optimizer_continues_exactly():
    for same in run_ranks(pickled, 2):
        assert len(same) > 20
        assert all(same)


# A sharded model in the process that is not the optimizer's.


def beside_a_sharded_model(rank, world):
    """What a step without gradients says of a model beside a sharded one, and of the sharded one's old parameters."""
    found, kept = {}, []
    for name, model in (("beside", Bag()), ("replaced", Bag())):
        optimizer = APOLLO(groups_of(model, low_rank(model, 3)))
        other = nn.Linear(3, 3)
        kept.append(model)
        fully_shard(model if name == "replaced" else other, mesh=init_device_mesh("cpu", (world,)))
        try:
            optimizer.step()
            found[name] = "stepped"
        except ValueError as error:
            found[name] = str(error)
    kept.append(other)
    bare = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(6, 4))]  # of no module, as weights of losses are
    APOLLO(bare, rank=2).step()
    found["bare"] = [p.tolist() for p in bare]
    return found


def test_a_sharded_model_of_another_optimizer_is_none_of_its_business():
    (found,) = run_ranks(beside_a_sharded_model, 1)
    assert found["beside"] == "stepped"
    assert found["bare"] == [[1.0] * 5, [[1.0] * 4] * 6]
    assert "fully_shard replaced its parameters" in found["replaced"]
