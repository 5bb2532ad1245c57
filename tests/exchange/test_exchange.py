"""Collectives of a step: how many, how many bytes, against the plan."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apollo_dist import APOLLO, Fira, GaLore
from apollo_dist.exchange import buckets

from ..engines import initialize, zero_config
from ..models import Bag, gradients, groups_of, low_rank, shapes_of
from ..ranks import run_ranks
from ..sharded import fsdp1, fsdp2


class Counter:
    """Counts what goes through torch.distributed, and the bytes that all-to-alls and all-reduces send to other ranks.

    For an all-reduce of n numbers that is what a ring sends: 2 (world - 1) / world of them, rounded up.
    """

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
            if name == "all_reduce":
                world = dist.get_world_size()
                self.bytes.append(math.ceil(2 * (world - 1) * args[0].numel() / world) * args[0].element_size())
            return original(*args, **kwargs)

        return call


def fsdp2_step(rank, world, options, optimizer=APOLLO):
    model = Bag()
    shapes, ranks = shapes_of(model), low_rank(model, 2)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer(groups_of(model, ranks), **options)
    found = []
    for step in range(3):
        model(gradients(shapes, step, rank)).backward()
        with Counter(rank) as counter:
            optimizer.step()
        found.append((counter.calls, counter.bytes))
        optimizer.zero_grad()
    (built,) = optimizer._parts.plans.built.values()
    sent = [group_step.plan.numbers_sent(rank) for group_step in built.shard_groups]
    assert [tuple(4 * numbers for numbers in pair) for pair in sent] == [
        u.exchange.bytes_sent for u in built.shard_groups
    ]
    return found[1:], [group_step.exchange.bytes_sent for group_step in built.shard_groups]


@pytest.mark.parametrize(("options", "second"), [({}, "all_to_all_single"), ({"scale_type": "tensor"}, "all_reduce")])
def test_two_collectives_whatever_the_number_of_matrices(options, second):
    for found, predicted in run_ranks(fsdp2_step, 3, options):
        assert len(predicted) == 1
        for calls, sent in found:
            assert calls == ["all_to_all_single", second]
            assert tuple(sent) == predicted[0]


def test_three_where_answers_depend_on_sums_of_the_whole_matrix():
    """Fira's limiter is known before its two low-rank updates travel, as one."""
    options = {"proj": "random"}
    fira, galore = (run_ranks(fsdp2_step, 3, options, rule) for rule in (Fira, GaLore))
    shapes = shapes_of(Bag())
    cut = sum(len(shapes[name]) == 2 and shapes[name][0] > 1 for name in low_rank(Bag(), 2))
    for (found, predicted), (_, (without,)) in zip(fira, galore, strict=True):
        for calls, (first, terms, second) in found:
            assert calls == ["all_to_all_single", "all_reduce", "all_to_all_single"]
            assert predicted == [(first, terms + second)]
            assert terms == 4 * math.ceil(2 * 2 * cut / 3)
            # Not much more than GaLore's r = 2 numbers of a channel: r + 1, not 2 r + 1.
            assert first >= without[0] and without[1] < second < 2 * without[1]


def in_buckets(rank, world):
    """Weights and moments of some layouts and rules, and the calls of a step, with one bucket and with many."""
    found = {}
    for numbers in (buckets.NUMBERS, 60):
        for name, (shard, options) in BUCKETED.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(buckets, "NUMBERS", numbers)
                patch.setattr(buckets, "CHANNELS", 1)
                found.setdefault(name, []).append(_trained(shard, options, rank, world))
    return found


def _trained(shard, options, rank, world):
    options = dict(options)
    model = Bag(shapes=[(24, 7), (6, 25), (9, 9), (3, 10), (5, 31), (40, 64), (64, 96)])
    model = model.to(options.pop("dtype", torch.float32))
    shapes, ranks = shapes_of(model), low_rank(model, options.pop("rank"))
    model = shard(model, options.pop("kind", ""), world)
    optimizer = APOLLO(groups_of(model, ranks), model=model, update_proj_gap=2, **options)
    for step in range(3):
        model(gradients(shapes, step, rank)).backward()
        with Counter(rank) as counter:
            optimizer.step()
        optimizer.zero_grad()
    (group_step,) = optimizer._parts.plans.built.popitem()[1].shard_groups
    assert sum(counter.bytes) == sum(group_step.exchange.bytes_sent)
    state = [v for slot in optimizer.named_state().values() for v in slot.values() if isinstance(v, torch.Tensor)]
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    tensors = [t.detach().clone() for t in [*weights, *state]]
    return group_step.plan.buckets, counter.calls, tensors


CHANNEL, TENSOR = {"rank": 4, "weight_decay": 0.1}, {"rank": 1, "scale_type": "tensor"}
BUCKETED = {
    "FSDP2": (fsdp2, CHANNEL),
    "FSDP2, tensor": (fsdp2, TENSOR),
    "FSDP2, projections made anew": (fsdp2, {**CHANNEL, "cache_projection": False}),
    "FSDP2, bf16": (fsdp2, {**CHANNEL, "dtype": torch.bfloat16}),
    "FSDP1": (fsdp1, {**CHANNEL, "kind": "full"}),
    "FSDP1, one flat parameter": (fsdp1, {**CHANNEL, "kind": "one flat"}),
}


@pytest.mark.slow
def test_buckets_change_no_bit():
    """Sums are over the same ranks in the same order, whichever bucket they travel in."""
    for found in run_ranks(in_buckets, 3):
        for name, ((one, calls, expected), (many, bucketed, got)) in found.items():
            assert one == 1 < many, name
            second = [calls[1:], bucketed[many:]]
            assert calls[:1] + second[0] == calls and second[0] == second[1], name
            assert bucketed[:many] == ["all_to_all_single"] * many, name
            for a, b in zip(expected, got, strict=True):
                assert torch.equal(a, b), name


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


def counted_steps(engine, optimizer, loss_of, rank, steps):
    """(collectives, bytes sent) of each call of the optimizer's ``step()`` in the last of ``steps`` engine steps."""
    calls = []
    original = type(optimizer).step

    def counted(*args, **kwargs):
        with Counter(rank) as counter:
            original(optimizer, *args, **kwargs)
        calls.append((counter.calls, sum(counter.bytes)))

    optimizer.step = counted
    for step in range(steps):
        calls.clear()
        engine.backward(loss_of(step))
        engine.step()
    return list(calls)


def zero_step(rank, world, config):
    model = Bag()
    shapes, ranks = shapes_of(model), low_rank(model, 2)
    optimizer = APOLLO(groups_of(model, ranks))
    engine = initialize(model, config, optimizer=optimizer)
    calls = counted_steps(engine, optimizer, lambda step: engine(gradients(shapes, step, rank)), rank, 2)
    predicted = []
    for b in optimizer._parts.plans.built.values():
        collectives = []
        for u in b.shard_groups:
            collectives += ["all_to_all_single"] * u.plan.needs_exchange1
            collectives += ["all_reduce" if u.plan.reduces else "all_to_all_single"] * u.plan.needs_exchange2
        predicted.append((collectives, sum(sum(u.exchange.bytes_sent) for u in b.shard_groups)))
    return calls, predicted


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (zero_config(2), 3),
        (zero_config(3), 3),
        (zero_config(3, zero_optimization={"sub_group_size": 60}), 8),
        (zero_config(3, zero_optimization={"sub_group_size": 1}), 25),
    ],
)
def test_zero_calls_once_for_each_group_or_sub_group(config, least):
    for calls, predicted in run_ranks(zero_step, 2, config):
        assert calls == predicted
        assert len(calls) >= least
        assert all(len(collectives) <= 2 for collectives, _ in calls)
        assert any(len(collectives) == 2 for collectives, _ in calls)
        assert any(collectives == [] for collectives, _ in calls), "AdamW's parameters need no exchange"


def nothing_shared_under_zero3(rank, world):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8 * world))
    optimizer = APOLLO(model, rank=2, disable_nl=True)
    engine = initialize(model, zero_config(3), optimizer=optimizer)
    return counted_steps(engine, optimizer, lambda _: engine(torch.ones(2, 4)).sum(), rank, 2)


def test_zero3_needs_no_collective_if_nothing_is_shared():
    """Rows are divided evenly, so no rank holds a part of one."""
    assert run_ranks(nothing_shared_under_zero3, 2) == [[([], 0), ([], 0)]] * 2


def test_counter_sees_collectives():
    assert run_ranks(one_all_reduce, 2) == [["all_reduce"]] * 2


def one_all_reduce(rank, world):
    with Counter(rank) as counter:
        dist.all_reduce(torch.ones(1))
    return counter.calls
