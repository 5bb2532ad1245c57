"""Stochastic rounding of bf16 weights is the same under every layout, number of ranks and kind of kernels.

Gradients are small integers, so that an engine's mean of them is exact, as are sums of them in any order. Rules whose
other sums are exact as well give the same bits everywhere. Of the others a weight may differ where sums in another
order are another fp32 number, which once in 2**16 falls on the other side of the random bits; a wrong place or step
would make every second one differ.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from apollo_dist import APOLLO, SCALE, SGD, AdamMini, AdamW, Fira, GaLore, Muon, checkpoint, layerwise
from apollo_dist.kernels.rounding import key_of, random_bits
from apollo_dist.sharding.grid import GridPartition
from apollo_dist.sharding.local_shard import view_of
from apollo_dist.sharding.regions import FlatPartition
from apollo_dist.sharding.spans import spans_of

from ..models import Bag, groups_of, low_rank, shapes_of
from ..ranks import run_ranks
from ..rules.problems import Llama
from ..rules.table_runs import WRAPS
from ..sharded import whole

STEPS, DIFFERENT = 4, 3
EXACT_SUMS = {"rank": 4, "proj_type": "rademacher", "disable_nl": True, "update_proj_gap": 2}
EXACT = {
    "AdamW": (AdamW, {}),
    "AdamW, bf16 moments": (AdamW, {"adam_dtype": torch.bfloat16}),
    "SGD": (SGD, {"momentum": 0.9}),
    "APOLLO": (APOLLO, EXACT_SUMS),
}
NEAR = {
    "APOLLO, limiter": (APOLLO, {"rank": 3, "update_proj_gap": 2, "adam_dtype": "bfloat16"}),
    "GaLore": (GaLore, {"rank": 3, "proj": "random"}),
    "Fira": (Fira, {"rank": 3, "proj": "random"}),
    "Muon": (Muon, {"ns_dtype": "state"}),
    "SCALE": (SCALE, {}),
    "AdamMini": (AdamMini, {}),
}
CASES = EXACT | NEAR
QUICK = ("APOLLO", "SGD")
LAYOUTS = {
    2: ["ddp", "fsdp1 full", "fsdp1 one flat", "fsdp2", "fsdp2 dim 1", "tp", "in backward"],
    3: ["fsdp2"],
    4: ["hsdp"],
}


def integers(shapes, step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randint(-3, 4, shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def build(case, wrapped, attach=None, **more):
    cls, options = CASES[case]
    options = {"lr": 0.003, "weight_decay": 0.1, "stochastic_rounding": True, **options, **more}
    return cls(wrapped, **options) if attach is None else attach(wrapped, optimizer=cls, **options)


def step_alone(model, optimizer, grads):
    for name, p in model.named_parameters():
        grad = grads[name]
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad.clone()
    optimizer.step()
    optimizer.zero_grad()


def train(case, layout, world, **more):
    model = Llama().bfloat16()
    shapes = shapes_of(model)
    in_backward = layout == "in backward"
    wrapped = WRAPS["fsdp2" if in_backward else layout](model, world)
    optimizer = build(case, wrapped, layerwise.attach if in_backward else None, **more)
    for step in range(STEPS):
        grads = integers(shapes, step)
        if world == 3:  # whose mean engines take as thirds
            step_alone(wrapped, optimizer, grads)
            continue
        wrapped(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(wrapped)


def differences(rank, world, layouts, cases):
    """How many weights differ from those of one process, by case and layout."""
    found = {}
    for case in cases:
        alone = train(case, "plain", 1)
        for layout in layouts:
            weights = train(case, layout, world)
            found[case, layout] = sum(int((weights[name] != wanted).sum()) for name, wanted in alone.items())
    return found


def cut_in_a_first_row(rank, world):
    """A wide matrix of which a rank alone has columns between those that it shares: parts of tiles are rounded."""
    found = {}
    for wrap in ("plain", "fsdp1 one flat"):
        model = Bag(shapes=[(9, 13)], experts=False).bfloat16()
        shapes = shapes_of(model)
        wrapped = WRAPS[wrap](model, world)
        groups = groups_of(wrapped, low_rank(model if wrap == "plain" else Bag(shapes=[(9, 13)], experts=False), 4))
        options = {key: value for key, value in EXACT_SUMS.items() if key != "rank"}
        optimizer = APOLLO(groups, lr=0.003, model=wrapped, stochastic_rounding=True, **options)
        for step in range(STEPS):
            wrapped(integers(shapes, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[wrap] = whole(wrapped)
    held = [
        m.held.parts
        for plan in optimizer._parts.plans.built.values()
        for one in plan.shard_groups
        for m in one.matrices
    ]
    different = sum(int((found["fsdp1 one flat"][name] != wanted).sum()) for name, wanted in found["plain"].items())
    return different, any(rows is not None for parts in held for _, rows, _ in parts)


@pytest.mark.slow
def test_parts_of_tiles_are_rounded_alike():
    results = run_ranks(cut_in_a_first_row, 2)
    assert [different for different, _ in results] == [0, 0]
    assert any(parts for _, parts in results), "no tile is in parts: another shape has to be found"


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (3, list(EXACT)),
        pytest.param(3, list(NEAR), marks=pytest.mark.slow),
        pytest.param(2, list(CASES), marks=pytest.mark.slow),
        pytest.param(4, list(EXACT), marks=pytest.mark.slow),
    ],
)
def test_layouts_round_alike(world, cases):
    for found in run_ranks(differences, world, LAYOUTS[world], cases):
        assert len(found) == len(cases) * len(LAYOUTS[world])
        for (case, layout), count in found.items():
            assert count <= (0 if case in EXACT else DIFFERENT), (case, layout, count)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_kernels_round_alike(case):
    pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
    by_torch, by_triton = (train(case, "plain", 1, kernels=kernels) for kernels in ("torch", "triton"))
    assert sum(int((by_torch[name] != by_triton[name]).sum()) for name in by_torch) <= DIFFERENT


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_weights_are_rounded_by_place_and_step(kernels):
    """By the plain formula: a step of 1/16 of the distance of two bf16 numbers, for rules by element and by row."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="Triton is an extra: pip install 'apollo-dist[triton]'")
    for cls, shapes in ((SGD, [(7, 12), (5,), (2, 3, 4, 5)]), (SCALE, [(7, 12), (12, 5)])):
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        named = [(f"layers.{i}.weight", p) for i, p in enumerate(weights)]
        optimizer = cls(named, lr=2.0**-11, seed=5, stochastic_rounding=True, kernels=kernels)
        for step in (1, 2):
            for name, p in named:
                p.grad = -torch.ones_like(p)
                size, row = p.numel(), p.shape[-1]
                bits = random_bits(key_of(5, name), step, 0, size // row, row, row).view(p.shape)
                exact = p.detach().float() + 2.0**-11
                p.wanted = ((exact.view(torch.int32) + bits) & -65536).view(torch.float32)
            optimizer.step()
            for _, p in named:
                assert torch.equal(p.detach().float(), p.wanted)
                assert 1.0 < float(p.detach().float().mean()) < 1.01 or p.numel() < 50


def resumed(rank, world, folder):
    """How many weights a run that goes on from a checkpoint has otherwise, by how it was saved."""
    found = {}
    for case in ("AdamW, bf16 moments", "APOLLO"):
        want = train(case, "fsdp2", world)
        model = Llama().bfloat16()
        shapes = shapes_of(model)
        wrapped = WRAPS["fsdp2"](model, world)
        optimizer = build(case, wrapped)
        for step in range(2):
            step_alone(wrapped, optimizer, integers(shapes, step))
        checkpoint.save(f"{folder}/{case}", wrapped, optimizer)
        for layout in ("fsdp2", "fsdp1 full"):
            fresh = WRAPS[layout](Llama(seed=1).bfloat16(), world)
            optimizer = build(case, fresh)
            checkpoint.load(f"{folder}/{case}", fresh, optimizer)
            for step in range(2, STEPS):
                fresh(integers(shapes, step)).backward()
                optimizer.step()
                optimizer.zero_grad()
            weights = whole(fresh)
            assert optimizer.param_groups[0]["stochastic_rounding"] is True
            found[case, layout] = sum(int((weights[name] != wanted).sum()) for name, wanted in want.items())
    # Into fp32 weights and moments, which nothing rounds: how they are stored is not the checkpoint's.
    fresh = WRAPS["fsdp2"](Llama(seed=1), world)
    after = AdamW(fresh)
    checkpoint.load(f"{folder}/AdamW, bf16 moments", fresh, after)
    step_alone(fresh, after, {name: grad.float() for name, grad in integers(shapes, 2).items()})
    moments = after.named_state()["lm_head.weight"]
    assert {moments[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert bool((moments["exp_avg_sq"] > 0).any())
    assert after.param_groups[0]["stochastic_rounding"] is False
    return found


@pytest.mark.slow
def test_a_resumed_run_rounds_as_it_would_have(tmp_path):
    for found in run_ranks(resumed, 2, str(tmp_path)):
        assert set(found.values()) == {0}, found


def test_state_dicts_keep_bf16_moments_and_the_count_of_steps():
    case = "AdamW, bf16 moments"
    want = train(case, "plain", 1)
    model = Llama().bfloat16()
    shapes = shapes_of(model)
    optimizer = build(case, model)
    for step in range(2):
        step_alone(model, optimizer, integers(shapes, step))
    twin = Llama(seed=1).bfloat16()
    twin.load_state_dict(model.state_dict())
    after = AdamW(twin, adam_dtype=torch.bfloat16)
    after.load_state_dict(optimizer.state_dict())
    assert after.param_groups[0]["stochastic_rounding"] is True
    for step in range(2, STEPS):
        step_alone(twin, after, integers(shapes, step))
    assert all(torch.equal(p.detach(), want[name]) for name, p in twin.named_parameters())
    size = sum(p.numel() for p in twin.parameters())
    assert after.state_bytes() == 4 * size


def test_where_no_weight_is_in_bf16_it_is_an_error():
    for dtype, name in ((torch.float32, "float32"), (torch.float16, "float16")):
        model = torch.nn.Linear(4, 3).to(dtype)
        groups = [{"params": [("weight", model.weight)], "rank": 2}, {"params": [("bias", model.bias)]}]
        optimizer = APOLLO(groups, stochastic_rounding=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = model.weight.detach().clone()
        with pytest.raises(ValueError, match=f"weights in bfloat16, and the weights that this step updates are {name}"):
            optimizer.step()
        assert torch.equal(model.weight, before)
        for group in optimizer.param_groups:
            group["stochastic_rounding"] = False
        optimizer.step()
        # Switched on later it is looked at again.
        optimizer.param_groups[0]["stochastic_rounding"] = True
        with pytest.raises(ValueError, match="it would do nothing"):
            optimizer.step()
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False, got 'yes'"):
        AdamW(torch.nn.Linear(4, 3), stochastic_rounding="yes")
    with pytest.raises(ValueError, match=r"adam_dtype must be None .*, got 'float16'"):
        AdamW(torch.nn.Linear(4, 3), adam_dtype=torch.float16)


def test_the_first_step_tells(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3).bfloat16(), torch.nn.LayerNorm(3))
    optimizer = AdamW(model, stochastic_rounding=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with caplog.at_level("INFO", "apollo_dist"):
        optimizer.step()
    assert "stochastic rounding of 2 of 4 parameters, which are bf16" in caplog.text


PARTITIONS = {
    "flat": ((5, 7), FlatPartition(((0, 9), (9, 9), (9, 35)))),
    "flat, four dimensions": ((3, 2, 4, 5), FlatPartition(((0, 47), (47, 120)))),
    "scalar": ((), FlatPartition(((0, 1),))),
    "rows": ((6, 4), GridPartition(((((0, 3),), ((0, 4),)), (((3, 6),), ((0, 4),))))),
    "columns": ((6, 4), GridPartition(((((0, 6),), ((0, 1),)), (((0, 6),), ((1, 4),))))),
    "runs": ((8, 6), GridPartition(((((0, 2), (4, 6)), ((1, 3), (4, 5))), (((2, 4),), ((0, 6),))))),
    "the middle of three": ((3, 8, 5), GridPartition(((((0, 3),), ((2, 4), (6, 8)), ((0, 5),)), (((1, 2),), (), ())))),
    "inside of three": ((3, 8, 5), GridPartition(((((1, 3),), ((2, 7),), ((1, 4),)),))),
}


@pytest.mark.parametrize("case", PARTITIONS)
def test_spans_say_where_local_elements_lie(case):
    """Every local element is in one span, at the index that it has in the whole."""
    shape, partition = PARTITIONS[case]
    indices = torch.arange(math.prod(shape)).view(shape)
    ranks = len(partition.ranges if isinstance(partition, FlatPartition) else partition.runs)
    for rank in range(ranks):
        local = torch.full((partition.numel(rank),), -1)
        for box in partition.boxes(rank, shape):
            window = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
            view_of(local, box.offset, box.sizes, box.strides).copy_(indices[window])
        seen = torch.zeros_like(local)
        for span in spans_of(partition.boxes(rank, shape), shape):
            expected = span.first + span.stride * torch.arange(span.rows)[:, None] + torch.arange(span.columns)
            assert torch.equal(span.view(local), expected), span
            span.view(seen).add_(1)
        assert bool((seen == 1).all())
