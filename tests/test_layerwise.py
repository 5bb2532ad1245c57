"""Updates inside backward take the trajectory of the ordinary step, and never hold more than one layer's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apollo_dist import checkpoint, layerwise

from .models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from .ranks import run_ranks
from .reference import Reference
from .test_exact_torch import CASES, GAP, STEPS, TOLERANCE, whole, wrap

UNUSED = ("layers.1.", "layers.4.linear")  # a whole layer, and a part of one: not in steps 3 and 4


def loss_of(wrapped: nn.Module, shapes: dict[str, torch.Size], step: int, rank: int) -> Tensor:
    return wrapped(gradients(shapes, step, rank))


def train(engine: str, world: int, rank: int, options: dict, folder: str) -> dict[str, float]:
    """Errors against the reference; with a schedule, and halfway a checkpoint that a new model and optimizer load."""
    options = dict(options)
    shapes = shapes_of(Bag())
    ranks = low_rank(Bag(), options.pop("rank", 3))
    common = {"update_proj_gap": GAP, "seed": 5, **options}
    reference = Reference(dict(Bag().double().named_parameters()), ranks, **common)

    def build(seed: int):
        model = Bag(seed).double()
        wrapped = wrap(model, engine, world)
        optimizer = layerwise.attach(wrapped, groups_of(wrapped, ranks), **common)
        return model, wrapped, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)

    model, wrapped, optimizer, scheduler = build(0)
    errors = {}
    for step in range(STEPS):
        if step == STEPS // 2:
            checkpoint.save(folder, wrapped, optimizer, {"scheduler": scheduler.state_dict()})
            optimizer.detach()
            model, wrapped, optimizer, scheduler = build(9)
            found = checkpoint.load(folder, wrapped, optimizer)
            scheduler.load_state_dict(found.extra["scheduler"])
        reference.lr = optimizer.param_groups[0]["lr"]
        loss_of(wrapped, shapes, step, rank).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        reference.step(mean_gradients(shapes, step, world))
        if step in (0, 1, STEPS - 1):
            for name, p in model.named_parameters():
                errors[f"{name} at step {step + 1}"] = relative_error(whole(p), reference.weights[name])
    assert reference.lr < 0.6 * optimizer.defaults["lr"]
    return errors


def all_cases(rank: int, world: int, engines: tuple[str, ...], folder: str) -> dict[str, dict[str, float]]:
    return {
        f"{engine}, {name}": train(engine, world, rank, options, f"{folder}/{engine}-{name}")
        for engine in engines
        for name, options in CASES.items()
    }


@pytest.mark.parametrize(
    ("world", "engines"),
    [
        (1, ("plain", "fsdp2")),
        (2, ("fsdp2",)),
        (3, ("fsdp2",)),
        pytest.param(4, ("fsdp2", "hsdp"), marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(world, engines, tmp_path):
    for errors in run_ranks(all_cases, world, engines, str(tmp_path)):
        for case, found in errors.items():
            worst = max(found, key=found.get)
            assert found[worst] < TOLERANCE, f"{case}: {worst} is off by {found[worst]:.1e}"
