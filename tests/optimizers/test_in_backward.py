"""Updates inside backward on real networks: recomputed activations, memory, tied parameters, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint as recomputed

from apollo_dist import APOLLO, APOLLOMini, layerwise

from ..exactness.test_exact_torch import whole
from ..ranks import run_ranks
from ..versions import backward_on_cpu, needs_fsdp2


class Layer(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Network(nn.Module):
    """Layers whose gradients autograd makes; ``reentrant`` None: without activation checkpointing."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Layer() for _ in range(5)])
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor, reentrant: bool | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if reentrant is None else recomputed(layer, x, use_reentrant=reentrant)
        return self.head(x).square().mean()


def sharded(model: nn.Module, world: int) -> nn.Module:
    """Under FSDP2, unless ``world`` is 0."""
    if world:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def inputs(step: int, rank: int) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(100 * step + rank)).double()


def both_ways(rank: int, world: int, engine: str, reentrant: bool | None, mini: bool) -> float:
    """The largest difference between the weights of the ordinary step and those of updates inside backward."""
    weights = []
    shards = 0 if engine == "plain" else world
    for inside in (False, True):
        model = sharded(Network().double(), shards)
        options = {"lr": 1e-2, "update_proj_gap": 2, **({} if mini else {"rank": 3})}
        ordinary = APOLLOMini if mini else APOLLO
        optimizer = layerwise.attach(model, mini=mini, **options) if inside else ordinary(model, **options)
        for step in range(5):
            optimizer.zero_grad()
            x = inputs(step, rank).requires_grad_(reentrant is True)
            optimizer.step(lambda x=x, model=model: model(x, reentrant).backward())
        weights.append([whole(p).clone() for p in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def alive(parameters: list[nn.Parameter]) -> int:
    """Elements of the gradients that exist on this rank; those that FSDP2 has still to reduce are not counted."""
    held = [p.grad for p in parameters if p.grad is not None]
    return sum((g.to_local() if hasattr(g, "to_local") else g).numel() for g in held)


def peak(rank: int, world: int, engine: str, inside: bool) -> tuple[int, int]:
    """The most gradient elements alive whenever one becomes ready; and those of the largest part of the model."""
    model = sharded(Network().double(), 0 if engine == "plain" else world)
    seen: list[int] = []
    parameters = list(model.parameters())  # in the middle of a backward pass FSDP2 shows others
    for p in parameters:  # before the optimizer's own hooks
        p.register_post_accumulate_grad_hook(lambda _: seen.append(alive(parameters)))
    optimizer = layerwise.attach(model, rank=3) if inside else APOLLO(model, rank=3)
    local = [(p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.layers[0].parameters()]
    for step in range(2):
        model(inputs(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 2 * len(parameters)
    return max(seen), sum(local) if engine == "fsdp2" else max(local)


def real_networks(rank: int, world: int, engines: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for engine in engines:
        for reentrant in (None, False, True):
            found[f"{engine}, reentrant {reentrant}"] = both_ways(rank, world, engine, reentrant, False)
        found[f"{engine}, mini"] = both_ways(rank, world, engine, None, True)
        found[f"{engine} peak"] = (peak(rank, world, engine, True), peak(rank, world, engine, False))
    return found


@pytest.mark.parametrize(
    ("world", "engines"), [(1, backward_on_cpu("plain", "fsdp2")), pytest.param(2, ("fsdp2",), marks=needs_fsdp2)]
)
def test_with_recomputed_activations_and_in_one_layers_memory(world, engines):
    for found in run_ranks(real_networks, world, engines):
        for case, value in found.items():
            if case.endswith(" peak"):
                (inside, largest), (ordinary, _) = value
                assert inside <= largest, case
                assert ordinary > 4 * largest, case
            else:
                assert value < 1e-12, case


def message_of(work: Callable[[], object]) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return "no error"


def test_what_cannot_be_exact_is_refused_in_one_process():
    x = inputs(0, 0)
    model = Network().double()
    optimizer = layerwise.attach(model, rank=3)
    assert "no gradient became ready" in message_of(optimizer.step)
    assert "by another optimizer already" in message_of(lambda: layerwise.attach(model, rank=3))
    model(x).backward()
    before = [p.detach().clone() for p in model.parameters()]
    # The gradient of the head is the first to come again.
    assert "head.weight got a second gradient before step()" in message_of(lambda: model(x).backward())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.zero_grad()
    optimizer.step()
    model(x).backward()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    assert "head.weight and 0 others have gradients" in message_of(optimizer.step)
    model.zero_grad()
    optimizer.step()

    with torch.autocast("cpu", torch.float16):
        assert "Use bfloat16" in message_of(lambda: model(x))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(x)).backward()
    assert "GradScaler" in message_of(lambda: scaler.step(optimizer))
    assert "cannot be added" in message_of(lambda: optimizer.add_param_group({"params": [nn.Parameter(x)]}))
    assert "cannot be copied" in message_of(lambda: copy.deepcopy(optimizer))
    optimizer.attach(model)
    assert "are replaced by others" in message_of(lambda: optimizer.attach(Network()))
    optimizer.detach()
    assert "detached" in message_of(optimizer.step)

    assert "skip_nonfinite" in message_of(lambda: layerwise.attach(model, rank=3, skip_nonfinite=True))
    assert "needs the model" in message_of(lambda: layerwise.attach(list(model.parameters()), rank=3))
    assert "is float16" in message_of(lambda: layerwise.attach(Network().half(), rank=3))
    # None of these left a hook.
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_tied_parameter_is_updated_once_with_its_whole_gradient():
    weights = []
    for make in (APOLLO, layerwise.attach):
        model = Network().double()
        model.layers[3].up.weight = model.layers[0].up.weight
        optimizer = make(model, rank=3)
        for step in range(3):
            model(inputs(step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    # Two segments, each with a backward pass of its own: two gradients.
    assert "second gradient" in message_of(lambda: model(inputs(0, 0).requires_grad_(), True).backward())


def refusals(rank: int, world: int) -> dict[str, str]:
    found: dict[str, str] = {}
    x = inputs(0, rank)
    model = Network().double()
    found["ddp"] = message_of(lambda: layerwise.attach(nn.parallel.DistributedDataParallel(model), rank=3))
    found["whole"] = message_of(lambda: layerwise.attach(model, rank=3))
    from torch.distributed.fsdp import FullyShardedDataParallel

    fsdp1 = FullyShardedDataParallel(Network(), device_id=torch.device("cpu"), use_orig_params=True)
    found["fsdp1"] = message_of(lambda: layerwise.attach(fsdp1, rank=3))
    # An error of one rank is one of both.
    model = sharded(Network().double(), world)
    found["one rank"] = message_of(lambda: layerwise.attach(model, rank=3, skip_nonfinite=rank == 1))
    optimizer = layerwise.attach(model, rank=3)
    model.set_requires_gradient_sync(False)
    found["sync"] = message_of(lambda: model(x))
    model.set_requires_gradient_sync(True)
    with torch.no_grad():
        model(x)  # an evaluation
    model(x).backward()
    before = [whole(p).clone() for p in model.parameters()]
    found["second backward"] = message_of(lambda: model(x).backward())
    same = all(torch.equal(a, whole(p)) for a, p in zip(before, model.parameters(), strict=True))
    found["nothing moved"] = str(same)
    optimizer.detach()
    late = Network().double()
    own = dict(enumerate([torch.distributed.new_group([one]) for one in range(world)]))
    optimizer = layerwise.attach(late, rank=3, process_group=own[rank])  # which trains on its own
    late(x).backward()
    optimizer.step()
    sharded(late, world)
    late(x).backward()
    found["sharded late"] = message_of(optimizer.step)
    return found


@needs_fsdp2
def test_what_cannot_be_exact_is_refused_on_every_rank():
    wanted = {
        "ddp": "the model is wrapped in DistributedDataParallel",
        "whole": "layers.0.up.weight is not sharded by FSDP2, and 2 ranks train it",
        "fsdp1": "sharded by FSDP1",
        "one rank": "rank 1: ValueError: skip_nonfinite",
        "sync": "set_requires_gradient_sync(False)",
        "second backward": "got a second gradient before step()",
        "nothing moved": "True",
        "sharded late": "attach after it is sharded",
    }
    for rank, found in enumerate(run_ranks(refusals, 2)):
        assert found.keys() == wanted.keys()
        for case, words in wanted.items():
            # The rank that fails raises its own error, and the other one says whose it is.
            assert (words.removeprefix("rank 1: ValueError: ") if rank else words) in found[case], case
