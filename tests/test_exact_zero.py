"""DeepSpeed ZeRO 0, 1, 2 equal one process with whole matrices, in fp32 to 1e-5 relative.

DeepSpeed's flats are fp32, so 25 steps of rounding in the gradients, norms and updates show at 1e-7 each; 1e-5 is that
with room for the limiter, which compares norms. A wrong element shows as 1e-2 or more.
"""

import pytest
import torch

from apollo_dist import APOLLO

from .engines import initialize, zero_config
from .models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from .ranks import run_ranks
from .reference import Reference

STEPS, GAP, TOLERANCE = 25, 8, 1e-5

# name -> (DeepSpeed config, APOLLO options, what the test does besides)
CASES = {
    "zero0": (zero_config(0), {}, {}),
    "zero1": (zero_config(1), {"scale_type": "tensor", "scale": 4.0, "weight_decay": 0.1}, {}),
    "zero2": (zero_config(2), {"weight_decay": 0.1}, {}),
    "zero2 round robin": (zero_config(2, zero_optimization={"round_robin_gradients": True}), {}, {}),
    "zero1 round robin": (zero_config(1, zero_optimization={"round_robin_gradients": True}), {}, {}),
    "zero2 one group": (zero_config(2), {}, {"by_name": True}),
    "zero1 frozen": (zero_config(1), {}, {"frozen": "layers.1."}),
    "zero2 accumulation": (zero_config(2, gradient_accumulation_steps=2), {}, {"accumulation": 2}),
    "zero1 accumulation": (zero_config(1, gradient_accumulation_steps=2), {}, {"accumulation": 2}),
    "zero2 clipping": (zero_config(2, gradient_clipping=3.0), {}, {"clipping": 3.0}),
    "zero1 clipping": (zero_config(1, gradient_clipping=3.0), {"disable_nl": True}, {"clipping": 3.0}),
    "zero0 clipping": (zero_config(0, gradient_clipping=3.0), {}, {"clipping": 3.0}),
}


def clipped(grads: dict[str, torch.Tensor], limit: float) -> dict[str, torch.Tensor]:
    """Clipping by the global norm, as DeepSpeed does it."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    return {name: g * min(1.0, limit / (float(norm) + 1e-6)) for name, g in grads.items()}


def train(rank: int, world: int, config: dict, options: dict, extra: dict) -> dict[str, float]:
    """Errors of all weights against the reference after the last step."""
    model = Bag()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(extra.get("frozen", "nothing")))
    shapes = shapes_of(model)
    by_name = extra.get("by_name", False)
    ranks = {n: 1 if by_name else r for n, r in low_rank(model, 3).items() if n in shapes}
    reference = Reference(
        {n: p for n, p in model.named_parameters() if n in shapes},
        ranks,
        update_proj_gap=GAP,
        draw_dtype=torch.float32,
        **options,
    )
    optimizer = APOLLO(
        model if by_name else groups_of(model, ranks),
        update_proj_gap=GAP,
        **options,
        **({"rank": 1} if by_name else {}),
    )
    engine = initialize(model, config, optimizer=optimizer)
    accumulation = extra.get("accumulation", 1)
    for step in range(STEPS):
        micro = [accumulation * step + i for i in range(accumulation)]
        for i in micro:
            engine.backward(engine(gradients(shapes, i, rank, torch.float32)))
            engine.step()
        means = [mean_gradients(shapes, i, world, torch.float32) for i in micro]
        grads = {name: sum(m[name] for m in means) / accumulation for name in shapes}
        reference.step(clipped(grads, extra["clipping"]) if "clipping" in extra else grads)
    return {n: relative_error(p.detach(), reference.weights[n]) for n, p in model.named_parameters() if n in shapes}


def all_cases(rank: int, world: int) -> dict[str, dict[str, float]]:
    return {name: train(rank, world, *case) for name, case in CASES.items()}


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_equals_the_reference(world):
    for errors in run_ranks(all_cases, world):
        for case, found in errors.items():
            worst = max(found, key=found.get)
            assert found[worst] < TOLERANCE, f"{case}: {worst} is off by {found[worst]:.1e}"
