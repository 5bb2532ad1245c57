"""Collectives of a step: how many, how many bytes, against the plan."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apollo_dist import APOLLO

from .engines import initialize, zero_config
from .models import Bag, gradients, groups_of, low_rank, shapes_of
from .ranks import run_ranks


class Counter:
    """Counts what goes through torch.distributed, and the bytes that all-to-alls send to other ranks."""

    COLLECTIVES = (
        "all_to_all_single", "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast",
        "reduce_scatter_tensor", "all_to_all", "reduce", "gather", "scatter", "barrier", "send", "recv",
    )  # fmt: skip

    def __init__(self, rank):
        self.rank, self.calls, self.bytes = rank, [], []
        self.originals = {name: getattr(dist, name) for name in self.COLLECTIVES}

    def __enter__(self):
        for name, original in self.originals.items():
            setattr(dist, name, self.counted(name, original))
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def counted(self, name, original):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == "all_to_all_single":
                _, buffer, _, send = args
                self.bytes.append((sum(send) - send[self.rank]) * buffer.element_size())
            return original(*args, **kwargs)

        return call


def fsdp2_step(rank, world, options):
    model = Bag()
    shapes, ranks = shapes_of(model), low_rank(model, 2)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = APOLLO(groups_of(model, ranks), **options)
    found = []
    for step in range(3):
        model(gradients(shapes, step, rank)).backward()
        with Counter(rank) as counter:
            optimizer.step()
        found.append((counter.calls, counter.bytes))
        optimizer.zero_grad()
    (built,) = optimizer._builds.values()
    return found[1:], [unit.exchange.bytes_sent for unit in built.units]


def test_two_collectives_whatever_the_number_of_matrices():
    for options in ({}, {"scale_type": "tensor"}):
        for found, predicted in run_ranks(fsdp2_step, 3, options):
            assert len(predicted) == 1
            for calls, sent in found:
                assert calls == ["all_to_all_single"] * 2
                assert tuple(sent) == predicted[0]


def nothing_shared(rank, world):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8 * world))
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    optimizer = APOLLO(model, rank=2, disable_nl=True)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        with Counter(rank) as counter:
            optimizer.step()
    return counter.calls


def test_no_collective_if_nothing_is_shared():
    """A tall matrix in whole rows, without a limiter, concerns one rank for each row."""
    assert run_ranks(nothing_shared, 2) == [[], []]


def zero_step(rank, world):
    model = Bag()
    shapes, ranks = shapes_of(model), low_rank(model, 2)
    optimizer = APOLLO(groups_of(model, ranks))
    engine = initialize(model, zero_config(2), optimizer=optimizer)
    steps = []
    original = type(optimizer).step

    def counted(*args, **kwargs):
        with Counter(rank) as counter:
            original(optimizer, *args, **kwargs)
        steps.append((counter.calls, sum(counter.bytes)))

    for step in range(2):
        engine.backward(engine(gradients(shapes, step, rank)))
        optimizer.step = counted
        steps.clear()
        engine.step()
    predicted = [sum(sum(u.exchange.bytes_sent) for u in b.units) for b in optimizer._builds.values()]
    others = [shapes[name].numel() for name in shapes if name not in ranks]
    line = f"{len(others)} tensors with {sum(others):,} elements take AdamW"
    said = [line in b.summary() for b in optimizer._builds.values()]
    return list(steps), predicted, said


def test_zero_calls_once_for_each_group():
    for steps, predicted, said in run_ranks(zero_step, 2):
        assert sum(said) == 1, "the tensors that take AdamW are counted whole, whichever rank holds them"
        assert [sent for _, sent in steps] == predicted
        for calls, _ in steps:
            assert calls in ([], ["all_to_all_single"], ["all_to_all_single"] * 2)


def test_counter_sees_collectives():
    assert run_ranks(one_all_reduce, 2) == [["all_reduce"]] * 2


def one_all_reduce(rank, world):
    with Counter(rank) as counter:
        dist.all_reduce(torch.ones(1))
    return counter.calls
