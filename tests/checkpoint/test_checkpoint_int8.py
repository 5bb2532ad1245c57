"""Checkpoints of INT8 weights: codes and scales, under any number of ranks, and to and from other precisions."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

from apollo_dist import APOLLO, checkpoint
from apollo_dist.checkpoint.export import weights

from ..int8 import Lines, codes_and_scales, quantized
from ..models import gradients, groups_of, low_rank, shapes_of
from ..ranks import run_ranks
from ..sharded import fsdp1, fsdp2

pytest.importorskip("torchao", reason="torchao is an extra: pip install 'apollo-dist[quantized]'")

STEPS = 3


def build(kind, dtype=torch.bfloat16, seed=0, world=1):
    """A model (INT8, or in another precision), as it is wrapped, and its optimizer."""
    model = Lines(seed).to(dtype)
    model = quantized(model) if kind.startswith("int8") else model
    ranks = low_rank(model, 3)
    if kind.endswith("fsdp2"):
        model = fsdp2(model, "", world)
    elif kind == "fsdp1":
        model = fsdp1(model, "one flat", world)
    return model, APOLLO(groups_of(model, ranks), update_proj_gap=2, seed=5, model=model)


def train(model, optimizer, first, last):
    shapes = {f"layers.{i}.{n}": s for i, layer in enumerate(Lines().layers) for n, s in shapes_of(layer).items()}
    for step in range(first, last):
        model(gradients(shapes, step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(found, expected):
    assert found.keys() == expected.keys() and found
    for name, pair in found.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, expected[name], strict=True)), name


def test_a_resumed_run_has_the_codes_of_one_that_never_stopped(tmp_path):
    model, optimizer = build("int8")
    train(model, optimizer, 0, STEPS)
    checkpoint.save(tmp_path, model, optimizer)
    train(model, optimizer, STEPS, 2 * STEPS)
    resumed, other = build("int8", seed=9)
    checkpoint.load(tmp_path, resumed, other)
    train(resumed, other, STEPS, 2 * STEPS)
    assert_same(codes_and_scales(resumed), codes_and_scales(model))
    for (_, a), (_, b) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert a.dim() == 2 or torch.equal(a, b)


def through(folder, kind, dtype, model=None):
    """Save ``model`` to a checkpoint, and load it into another kind of model, which is returned."""
    if model is not None:
        checkpoint.save(folder, *model)
    other = build(kind, dtype, seed=9)
    checkpoint.load(folder, *other)
    return other


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
def test_to_fp32_and_back(tmp_path, scales):
    """The codes and scales are what they were; and bf16 models have the values, rounded to bf16."""
    first = build("int8", scales)
    train(*first, 0, STEPS)
    wide = through(tmp_path / "a", "dense", torch.float32, first)
    for name, (codes, scale) in codes_and_scales(first[0]).items():
        assert torch.equal(wide[0].get_parameter(name), codes.float() * scale.float()[:, None])
    back = through(tmp_path / "b", "int8", scales, wide)
    assert_same(codes_and_scales(back[0]), codes_and_scales(first[0]))
    for a, b in zip(first[1].state_dict()["state"].values(), back[1].state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    narrow = through(tmp_path / "a", "dense", torch.bfloat16)
    exported = weights(checkpoint.find(tmp_path / "a"))
    for name, p in wide[0].named_parameters():
        assert torch.equal(narrow[0].get_parameter(name), p.bfloat16())
        assert exported[name].dtype == scales and torch.equal(exported[name], p.to(scales))


def test_from_bf16_to_nearest(tmp_path, caplog):
    first = build("dense", torch.bfloat16)
    train(*first, 0, STEPS)
    second = through(tmp_path, "int8", torch.bfloat16, first)
    assert "tensors lose precision, such as layers" in caplog.text
    for name, (codes, scale) in codes_and_scales(second[0]).items():
        off = first[0].get_parameter(name).float() - codes.float() * scale.float()[:, None]
        assert (off.abs() <= 0.5001 * scale.float()[:, None]).all()


def on_ranks(rank, world, folder):
    """From a checkpoint of one process to FSDP2 in INT8, to FSDP1 in fp32, and saved again in INT8."""
    model, optimizer = build("int8 fsdp2", world=world)
    checkpoint.load(folder + "/one", model, optimizer)
    loaded = codes_and_scales(model)
    checkpoint.save(folder + "/fsdp2", model, optimizer, step=STEPS)
    flat, flat_optimizer = build("fsdp1", torch.float32, seed=9, world=world)
    checkpoint.load(folder + "/fsdp2", flat, flat_optimizer)
    checkpoint.save(folder + "/fsdp1", flat, flat_optimizer, step=STEPS)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    return loaded


@pytest.mark.slow
def test_under_other_engines_and_ranks(tmp_path):
    first = build("int8")
    train(*first, 0, STEPS)
    expected = copy.deepcopy(codes_and_scales(first[0]))
    checkpoint.save(tmp_path / "one", *first, step=STEPS)
    results = run_ranks(on_ranks, 3, str(tmp_path))
    assert_same({n: [torch.cat([r[n][i] for r in results]) for i in (0, 1)] for n in results[0]}, expected)
    for folder in ("fsdp2", "fsdp1"):
        again = through(tmp_path / folder, "int8", torch.bfloat16)
        assert_same(codes_and_scales(again[0]), expected)
