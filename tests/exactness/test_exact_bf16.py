"""bf16 engines equal the reference to the rounding of a bf16 weight, and APOLLO by name equals APOLLO by instance.

Every rank gives the same bf16 gradients, so their average is exact at two ranks, and the fp32 masters follow the
reference as in ``test_exact_zero``. What the model shows is a master rounded to bf16: half a unit in the last place is
2**-9 of the value; the bound is twice that, and 1e-4 of the largest weight for values near zero.
"""

import pytest
import torch

from apollo_dist import APOLLO, param_groups

from ..engines import full_weights, initialize, zero_config
from ..models import Bag, gradients, groups_of, low_rank, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from ..versions import DEEPSPEED, deepspeed_runs, needs_bf16_states, needs_zero12

STEPS, GAP = 12, 5
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "zero0": zero_config(0, **BF16),
    "zero1": zero_config(1, **BF16),
    "zero2": zero_config(2, **BF16),
    "BF16_Optimizer": zero_config(1, **BF16, data_types={"grad_accum_dtype": "fp32"}),
}


def train(rank, world, config):
    """By how much of the allowed rounding each weight is off, the largest for each parameter."""
    model = Bag().bfloat16()
    shapes, ranks = shapes_of(model), low_rank(model, 3)
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP, draw_dtype=torch.float32)
    optimizer = APOLLO(groups_of(model, ranks), update_proj_gap=GAP)
    engine = initialize(model, config, optimizer=optimizer)
    for step in range(STEPS):
        given = gradients(shapes, step, 0, torch.bfloat16)
        engine.backward(engine(given))
        engine.step()
        reference.step({name: g.double() for name, g in given.items()})
    found = {"wrapper": type(engine.optimizer).__name__}
    for name, p in model.named_parameters():
        expected = reference.weights[name]
        allowed = expected.abs() * 2.0**-8 + 1e-4 * expected.abs().max()
        found[name] = float(((p.detach().double() - expected).abs() / allowed).max())
    return found


def all_cases(rank, world):
    return {name: train(rank, world, config) for name, config in CASES.items() if deepspeed_runs(config, world)}


def without_masters(rank, world):
    """How many weights differ from those of one process with bf16 weights, by stage."""
    found = {}
    states = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    for stage in (2, 3):
        model, twin = Bag().bfloat16(), Bag().bfloat16()
        shapes, ranks = shapes_of(model), low_rank(model, 3)
        engine = initialize(
            model, zero_config(stage, bf16=states), optimizer=APOLLO(groups_of(model, ranks), update_proj_gap=GAP)
        )
        optimizer = APOLLO(groups_of(twin, ranks), update_proj_gap=GAP)
        for step in range(STEPS):
            given = gradients(shapes, step, 0, torch.bfloat16)
            engine.backward(engine(given))
            engine.step()
            for name, p in twin.named_parameters():
                p.grad = given[name].clone()
            optimizer.step()
        weights = full_weights(engine, model)
        found[stage] = sum(int((weights[n] != p.detach().double()).sum()) for n, p in twin.named_parameters())
    return found


@pytest.mark.slow
@needs_bf16_states
def test_bf16_without_fp32_masters_equals_one_process():
    """Every rounding is the same, bit for bit, but where sums in another order fall on the other side of one."""
    for found in run_ranks(without_masters, 2):
        assert all(different <= 3 for different in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_bf16_equals_the_reference(world):
    for results in run_ranks(all_cases, world):
        if "BF16_Optimizer" in results:
            # From 0.17.6 to 0.18.4 two of DeepSpeed's constants have one value, and the first one's wrapper is taken.
            taken = "FP16_UnfusedOptimizer" if (0, 17, 6) <= DEEPSPEED < (0, 18, 5) else "BF16_Optimizer"
            assert results["BF16_Optimizer"]["wrapper"] == taken
        for case, found in results.items():
            found.pop("wrapper")
            worst = max(found, key=found.get)
            assert found[worst] <= 1.0, f"{case}: {worst} is off by {found[worst]:.2f} of the allowed rounding"


class Tower(torch.nn.Module):
    """A model whose layers are all real ones, for a choice by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(4, 9)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(9, 9) for _ in range(3)])
        self.head = torch.nn.Linear(9, 2)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def by_name(rank, world, stage):
    """Weights after some steps: by name from the JSON, and by instance built from the model."""
    import apollo_dist  # noqa: F401

    results = []
    options = {"lr": 0.01, "rank": 3, "update_proj_gap": 2}
    for name in (True, False):
        model = Tower()
        block = {"optimizer": {"type": "APOLLO", "params": options}} if name else {}
        arguments = {"model_parameters": model.parameters()} if name else {"optimizer": APOLLO(model, **options)}
        engine = initialize(model, zero_config(stage, **block), **arguments)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(5):
            engine.backward(engine(torch.randn(3, 4, generator=generator)).pow(2).sum())
            engine.step()
        results.append({n: p.detach().double() for n, p in model.named_parameters()})
    low = {n for n, _ in param_groups(Tower(), rank=3)[0]["params"]}
    return low, {n: relative_error(w, results[1][n]) for n, w in results[0].items()}


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(n, marks=needs_zero12) for n in (1, 2))]
)
def test_by_name_in_the_config(stage):
    for low, errors in run_ranks(by_name, 2, stage):
        assert low == {f"layers.{i}.weight" for i in range(3)}
        assert max(errors.values()) < 1e-5, errors
