"""NVMe offload equals one process with whole matrices, where DeepSpeed can do it: it needs libaio and its headers.

Tensors go to the disk from 1 MiB on, so the model is larger than elsewhere. DeepSpeed compiles its asynchronous I/O at
the first use, which takes minutes; the compiled file is kept.
"""

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, checkpoint

from ..engines import full_weights, initialize, prepare, zero_config
from ..judge import judge
from ..models import Block, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from .zero_runs import BF16


def missing() -> str:
    """Why NVMe offload cannot be tested here; "" where it can."""
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    return "" if builder.is_compatible(verbose=False) else "DeepSpeed finds no libaio (apt-get install libaio-dev)"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

# Sizes whose partitions no alignment fits; the first, second and fourth matrix are swapped.
SHAPES = [(700, 801), (801, 700), (17, 5), (640, 900)]
STEPS, GAP = 5, 3


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(m, n) for m, n in SHAPES])

    def forward(self, wanted):
        total = torch.zeros(())
        for i, block in enumerate(self.layers):
            prefix = f"layers.{i}."
            total = total + block({k[len(prefix) :]: v for k, v in wanted.items() if k.startswith(prefix)})
        return total


def train(rank, world, zero, more):
    """Whether each sub-group is on the disk, the largest error of a weight, and what a checkpoint says."""
    prepare()
    config = zero_config(
        3,
        zero_optimization={"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2_000_000, **zero},
        zero_force_ds_cpu_optimizer=False,
        **more,
    )
    dtype = torch.bfloat16 if "bf16" in more else torch.float32
    model = Large().to(dtype)
    shapes, ranks = shapes_of(model), low_rank(model, 4)
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP, draw_dtype=torch.float32)
    engine = initialize(model, config, optimizer=APOLLO(groups_of(model, ranks), update_proj_gap=GAP))
    for step in range(STEPS):
        engine.backward(engine(gradients(shapes, step, rank, dtype)))
        engine.step()
        reference.step(mean_gradients(shapes, step, world, dtype))
    wrapper = engine.optimizer
    swapped = [wrapper._swappable_optimizer_subgroup(i) for i in range(len(wrapper.fp16_groups))]
    weights = full_weights(engine, model)
    try:
        checkpoint.save(zero["offload_optimizer"]["nvme_path"] + "/saved", engine, engine.basic_optimizer)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return swapped, max(relative_error(weights[n], reference.weights[n]) for n in shapes), refused


def nvme(case):
    return f"ZeRO-3, {case} on NVMe"


def on_disk(folder, **options):
    return {"device": "nvme", "nvme_path": folder, "pin_memory": False, **options}


def all_cases(rank, world, folder):
    disk, piped = on_disk(folder, buffer_count=4), on_disk(folder, buffer_count=6, pipeline_read=True)
    both = {"offload_optimizer": disk, "offload_param": on_disk(folder, buffer_size=1_000_000, max_in_cpu=0)}
    cases = {
        "optimizer": ({"offload_optimizer": disk, "sub_group_size": 1}, {}),
        "pipelined": ({"offload_optimizer": {**piped, "pipeline_write": True}, "sub_group_size": 1}, {}),
        "optimizer and parameters": ({**both, "sub_group_size": 1}, BF16),
    }
    return {name: train(rank, world, *case) for name, case in cases.items()}


def test_equals_the_reference(tmp_path):
    ranks = run_ranks(all_cases, 2, str(tmp_path))
    judge([{case: {"all": error} for case, (_, error, _) in one.items()} for one in ranks], 1e-5, nvme, "float32")
    for results in ranks:
        for case, (swapped, _, refused) in results.items():
            assert sum(swapped) == 3, case
            assert "with NVMe offload the fp32 weights are on the disk" in refused, case


def misplaced(rank, world, folder):
    try:
        train(rank, world, {"offload_optimizer": on_disk(folder, buffer_count=4)}, {})
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_gradient_that_deepspeed_would_read_back_wrongly_is_refused(tmp_path):
    first, second = run_ranks(misplaced, 2, str(tmp_path))
    assert first == second
    assert "layers.1.linear.weight: DeepSpeed keeps its gradient on NVMe" in first
    assert "sub_group_size" in first
