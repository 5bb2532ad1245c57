"""INT8 weights: every engine has the codes of one process, and these are those of the dense reference, to the last one.

With scales in float64 everything is computed in float64, so that rounding of sums moves a weight by 1e-15 and a code is
another one only where that crosses a random number: one in 1e10. Scales in bf16 are computed in fp32; there gradients
are small integers and projections signs, so that sums are exact in any order.
"""

import importlib.util
from itertools import product

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO, SCALE, SGD, AdamMini, AdamW, Fira, GaLore, Muon, layerwise
from apollo_dist.weights import int8

from ..int8 import Lines, codes_and_scales, quantized, store
from ..judge import assert_small
from ..models import gradients, groups_of, low_rank, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from ..sharded import fsdp2

pytest.importorskip("torchao", reason="torchao is an extra: pip install 'apollo-dist[quantized]'")

STEPS, GAP, SEED = 7, 3, 5
OPTIONS = {
    "channel": {"weight_decay": 0.1},
    "tensor": {"scale_type": "tensor", "scale": 4.0, "rank": 1},
    "signs": {"proj_type": "rademacher", "disable_nl": True},
    "signs, triton": {"proj_type": "rademacher", "disable_nl": True, "kernels": "triton"},
}


def wrap(model, engine, world):
    if engine == "ddp":
        # torch cannot broadcast these weights; every rank has made the same ones.
        return DistributedDataParallel(model, init_sync=False)
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh)
    return fsdp2(model, "", world) if engine.startswith("fsdp2") else model


def small_integers(shapes, step):
    """Gradients whose channels each have one large element, so that none is orthogonal to a direction of signs."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randint(-3, 4, shape, generator=generator).double() for name, shape in shapes.items()}
    for grad in found.values():
        (grad if grad.dim() == 1 else grad[:, 0] if grad.shape[0] >= grad.shape[1] else grad[0]).add_(64)
    return found


def train(engine, world, case, dtype=torch.float64):
    """Codes and scales of this rank after the last step; and how far other weights are from the reference."""
    int8._ELEMENTS["cpu"] = 100  # several windows of rows
    options = dict(OPTIONS[case])
    model = quantized(Lines().to(dtype))
    shapes, ranks = shapes_of(model), low_rank(model, options.pop("rank", 3))
    names = list(codes_and_scales(model))
    common = {"update_proj_gap": GAP, "seed": SEED, **options}
    plain = {n: p.dequantize() if n in names else p for n, p in model.named_parameters()}
    reference = Reference(plain, ranks, **{key: value for key, value in common.items() if key != "kernels"})
    wrapped = wrap(model, engine, world)
    make = layerwise.attach if engine.endswith("in backward") else APOLLO
    optimizer = (
        make(wrapped, groups_of(wrapped, ranks), **common)
        if make is layerwise.attach
        else make(groups_of(wrapped, ranks), model=wrapped, **common)
    )
    for step in range(STEPS):
        given = small_integers(shapes, step) if case.startswith("signs") else gradients(shapes, step, 0)
        wrapped(given).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(given)
        expected = store(reference.weights, names, SEED, step + 1)
    norms = [name for name in shapes if name not in names]
    errors = {}
    for name, p in model.named_parameters():
        if name in norms and dtype == torch.float64:
            full = p.full_tensor() if isinstance(p, DTensor) else p
            errors[name] = relative_error(full.detach(), reference.weights[name])
    return codes_and_scales(model), expected, errors


def all_cases(rank, world, engines, cases, dtype):
    return {f"{e}, {c}": train(e, world, c, dtype) for e in engines for c in cases}


def whole_codes(results, case):
    """The codes and scales of all ranks' rows: those of rank 0 where every rank has all."""
    ranks = [found[case][0] for found in results]
    if case.startswith("hsdp"):
        for name, i, j in product(ranks[0], (0, 1), (0, 1)):
            assert torch.equal(ranks[i][name][j], ranks[i + 2][name][j])
        ranks = ranks[:2]
    if case.startswith(("fsdp2", "hsdp")):
        return {n: [torch.cat([rank[n][i] for rank in ranks]) for i in (0, 1)] for n in ranks[0]}
    for rank in ranks[1:]:
        assert all(torch.equal(a, b) for n in ranks[0] for a, b in zip(ranks[0][n], rank[n], strict=True))
    return ranks[0]


PLACES = [
    (1, ("plain", "plain in backward")),
    (2, ("ddp", "fsdp2", "fsdp2 in backward")),
    (3, ("fsdp2",)),
    pytest.param(4, ("hsdp",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "engines"), PLACES)
def test_codes_are_those_of_the_reference(world, engines):
    results = run_ranks(all_cases, world, engines, ("channel", "tensor"), torch.float64)
    for case in results[0]:
        expected = results[0][case][1]
        for name, (codes, _) in whole_codes(results, case).items():
            assert torch.equal(codes, expected[name]), f"{case}: {int((codes != expected[name]).sum())} of {name}"
        assert_small(case, results[0][case][2], 1e-9)


def test_codes_with_scales_in_bf16_do_not_depend_on_the_ranks():
    """In fp32, as training has it: the same codes and scales at 1 and 2 ranks of DDP and at 2 and 3 of FSDP2.

    Also by Triton's kernel, in its interpreter.
    """
    cases = ["signs", *(["signs, triton"] if importlib.util.find_spec("triton") else [])]
    seen = []
    for world, engines in PLACES[:3]:
        results = run_ranks(all_cases, world, engines, cases, torch.bfloat16)
        seen += [(world, case, whole_codes(results, case)) for case in results[0]]
    _, _, first = seen[0]
    assert all(codes.unique().numel() > 20 for codes, _ in first.values())
    for world, case, found in seen[1:]:
        for name, pair in found.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, first[name], strict=True)), (world, case, name)


def low_rank_updates(rank, world, engine):
    """Codes and scales of this rank after steps of GaLore and Fira; on 3 ranks of FSDP2 some updates are elements."""
    int8._ELEMENTS["cpu"] = 40
    found = {}
    for kind in (GaLore, Fira):
        model = quantized(Lines().double())
        shapes, wrapped = shapes_of(model), wrap(model, engine, world)
        optimizer = kind(groups_of(wrapped, low_rank(model, 3)), lr=1e-2, update_proj_gap=GAP, model=wrapped)
        for step in range(4):
            wrapped(gradients(shapes, step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[f"{engine}, {kind.__name__}"] = (codes_and_scales(model),)
    return found


def test_low_rank_updates_do_not_depend_on_the_ranks():
    """float64: another order of rounding decides no code."""
    plain, sharded = (run_ranks(low_rank_updates, *where) for where in ((1, "plain"), (3, "fsdp2")))
    for kind in ("GaLore", "Fira"):
        found, wanted = whole_codes(sharded, f"fsdp2, {kind}"), whole_codes(plain, f"plain, {kind}")
        assert all(torch.equal(codes, wanted[name][0]) for name, (codes, _) in found.items()), kind


RULES = {
    "SCALE": lambda model: SCALE(model, lr=1e-2),
    "SGD": lambda model: SGD(model, lr=1e-3, momentum=0.9),
    "AdamW": lambda model: AdamW(model, lr=1e-2, weight_decay=0.1),
    "AdamMini": lambda model: AdamMini(model, lr=1e-2, weight_decay=0.1),
    "GaLore": lambda model: GaLore(groups_of(model, low_rank(model, 3)), lr=1e-2, update_proj_gap=GAP, model=model),
    "Fira": lambda model: Fira(groups_of(model, low_rank(model, 3)), lr=1e-2, update_proj_gap=GAP, model=model),
    "Muon": lambda model: Muon(model, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_its_own_step(rule, monkeypatch):
    """As the same optimizer of a model in float64, whose weights are rounded to INT8 after each step."""
    monkeypatch.setitem(int8._ELEMENTS, "cpu", 100)
    model, twin = quantized(Lines().double()), Lines().double()
    names = list(codes_and_scales(model))
    weights = {name: p for name, p in twin.named_parameters() if name in names}
    for name, p in model.named_parameters():
        if name in names:
            weights[name].data.copy_(p.dequantize())
    optimizers = [RULES[rule](each) for each in (model, twin)]
    for step in range(STEPS):
        given = gradients(shapes_of(twin), step, 0)
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each(given).backward()
            optimizer.step()
            optimizer.zero_grad()
        rounded = {name: p.detach().clone() for name, p in weights.items()}
        expected = store(rounded, names, optimizers[0].seed, step + 1)
        for name, p in weights.items():
            p.data.copy_(rounded[name])
        for name, (codes, _) in codes_and_scales(model).items():
            assert torch.equal(codes, expected[name]), f"{name} at step {step + 1}"
