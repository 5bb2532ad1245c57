"""Updates inside backward take the trajectory of the ordinary step, and never hold more than one layer's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apollo_dist import checkpoint, layerwise

from ..judge import judge
from ..models import Bag, Block, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from ..versions import backward_on_cpu, needs_fsdp2
from .test_exact_torch import CASES, GAP, STEPS, TOLERANCE, engine_of, whole, wrap

HALF = STEPS // 2
# Not used in some steps: a whole layer, and one parameter of each of three others, which are then not complete: one in
# the middle, and the first and the last whose gradients FSDP2 reduces.
UNUSED, UNUSED_STEPS = ("layers.1.", "layers.4.linear.", "embed.linear.", "layers.9.linear."), (3, 4, 9)


def used(model: nn.Module, step: int) -> dict[str, torch.Size]:
    shapes = shapes_of(model)
    return {n: s for n, s in shapes.items() if step not in UNUSED_STEPS or not n.startswith(UNUSED)}


def train(engine: str, world: int, rank: int, options: dict, folder: str | None) -> dict[str, float]:
    """Errors against the reference; with a schedule, and with a ``folder`` a checkpoint that a new model loads."""
    options = dict(options)
    ranks = low_rank(SkippingBag(), options.pop("rank", 3))
    common = {"update_proj_gap": GAP, "seed": 5, **options}
    reference = Reference(dict(SkippingBag().double().named_parameters()), ranks, **common)

    def build(seed: int):
        model = SkippingBag(seed).double()
        wrapped = wrap(model, engine, world)
        optimizer = layerwise.attach(wrapped, groups_of(wrapped, ranks), **common)
        return model, wrapped, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)

    model, wrapped, optimizer, scheduler = build(0)
    errors = {}
    for step in range(STEPS):
        if step == HALF and folder is not None:
            checkpoint.save(folder, wrapped, optimizer, {"scheduler": scheduler.state_dict()})
            model, wrapped, optimizer, scheduler = build(9)
            found = checkpoint.load(folder, wrapped, optimizer)
            scheduler.load_state_dict(found.extra["scheduler"])
        reference.lr = optimizer.param_groups[0]["lr"]
        wrapped(gradients(used(model, step), step, rank)).backward()
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
        scheduler.step()
        reference.step(mean_gradients(used(model, step), step, world))
        if step in (0, 1, STEPS - 1):
            for name, p in model.named_parameters():
                errors[f"{name} at step {step + 1}"] = relative_error(whole(p), reference.weights[name])
    assert reference.lr < 0.6 * optimizer.defaults["lr"]
    return errors


class SkippingBag(Bag):
    """A ``Bag`` that leaves alone what no gradient is wanted for, with one more layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.layers.append(Block(5, 8))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, module in [("embed", self.embed), *((f"layers.{i}", b) for i, b in enumerate(self.layers))]:
            inner = {k.removeprefix(name + "."): v for k, v in wanted.items() if k.startswith(name + ".")}
            if "norm" in inner and len(inner) == 1:
                total = total + OnlyNorm()(module, inner)
            elif inner:
                total = total + module(inner)
        return total


class OnlyNorm:
    """Calls a block, as FSDP2 needs, for the norm's part of the loss alone."""

    def __call__(self, block: nn.Module, wanted: dict[str, Tensor]) -> Tensor:
        linear = block.linear
        block.linear = nothing = Nothing()
        try:
            return block(wanted)
        finally:
            assert block.linear is nothing
            block.linear = linear


class Nothing(nn.Module):
    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return torch.zeros((), dtype=torch.float64)


def all_cases(rank: int, world: int, engines: tuple[str, ...], folder: str) -> dict[str, dict[str, float]]:
    return {
        f"{engine}, {name}": train(
            engine, world, rank, options, f"{folder}/{engine}-{name}" if name in ("channel", "tensor") else None
        )
        for engine in engines
        for name, options in CASES.items()
        if world < 3 or name in ("channel", "tensor")
    }


@pytest.mark.parametrize(
    ("world", "engines"),
    [
        (1, backward_on_cpu("plain", "fsdp2")),
        pytest.param(2, ("fsdp2",), marks=[pytest.mark.slow, needs_fsdp2]),
        pytest.param(3, ("fsdp2",), marks=[pytest.mark.slow, needs_fsdp2]),
        pytest.param(4, ("fsdp2", "hsdp"), marks=[pytest.mark.slow, needs_fsdp2]),
    ],
)
def test_equals_the_reference(world, engines, tmp_path):
    results = run_ranks(all_cases, world, engines, str(tmp_path))
    judge(results, TOLERANCE, engine=lambda case: f"{engine_of(case)}, in backward")
