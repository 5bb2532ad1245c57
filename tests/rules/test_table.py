"""Problems x rules x layouts: SCALE, Adam-mini, SGD and AdamW follow their dense references under every engine."""

from __future__ import annotations

import pytest

from ..judge import judge
from ..models import gradients, relative_error, shapes_of
from ..ranks import run_ranks
from .problems import CASES, Llama
from .table_runs import layouts, zero

# By number of ranks. float64 throughout: another order of rounding, 1e-15 a step.
LAYOUTS = {
    2: ["plain", "ddp", "fsdp1 full", "fsdp1 one flat", "fsdp2", "fsdp2 dim 1", "fsdp2 offload", "tp", "in backward"],
    3: ["fsdp1 one flat", "fsdp2"],
    4: ["fsdp2", "hsdp"],
}
# (stage, how); fp32 flat partitions: 6e-8 a step.
QUICK = [(2, "by name")]
STAGES = [
    (2, QUICK),
    pytest.param(2, [(0, ""), (1, ""), *QUICK, (3, ""), (2, "offload"), (3, "sub-groups")], marks=pytest.mark.slow),
    pytest.param(3, [(1, "by name"), (3, "sub-groups, offload")], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_process(rule, tied):
    model = Llama(tied=tied).double()
    optimizer, dense = CASES[rule].optimizer(model), CASES[rule].dense(dict(model.named_parameters()))
    shapes = shapes_of(model)
    for step in range(8):
        grads = gradients(shapes, step, 0)
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = None if i % 4 == 1 and step in (2, 3) else grads[name]
        optimizer.step()
        dense.step({name: p.grad for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        assert relative_error(p.detach(), dense.weights[name]) < 1e-12, name


def rule_of(case):
    return case.partition(", ")[0]


def engine_of(case):
    """The engine as the page of measured errors shows it."""
    layout = case.partition(", ")[2]
    if layout.startswith("ZeRO"):
        return layout
    names = {"plain": "one process", "ddp": "DDP", "hsdp": "HSDP", "tp": "TP", "in backward": "FSDP2, in backward"}
    return names.get(layout, layout.replace("fsdp", "FSDP"))


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_layouts(world, tmp_path):
    results = run_ranks(layouts, world, LAYOUTS[world], str(tmp_path), timeout=300)
    judge(results, 1e-9, engine_of, rule=rule_of)


@pytest.mark.parametrize(("world", "stages"), STAGES)
def test_zero(world, stages, tmp_path):
    results = run_ranks(zero, world, stages, str(tmp_path), timeout=300)
    judge(results, 1e-5, engine_of, "float32", rule=rule_of)
