"""``--engine fsdp1`` and ``--layerwise``: the same losses as every engine, resumed across engines."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from apollo_dist.pretrain import llama, step, train
from apollo_dist.pretrain.__main__ import main
from apollo_dist.pretrain.distributed import Ranks, SetupError
from apollo_dist.pretrain.optimizers import local
from apollo_dist.pretrain.run import Run
from apollo_dist.pretrain.settings import load_settings

from ..pretrain_runs import SMALL, SMALL_APOLLO, ZERO2, losses, write_text
from ..ranks import run_ranks
from .test_pretrain_nonfinite import spoil

# Two steps under each, one after the other; beside it one that stays under DDP.
LEGS = {
    "fsdp1": ["--engine=fsdp1", "--micro_batch_size=1"],
    "layerwise": ["--engine=fsdp2", "--layerwise"],
    "zero2": ["--engine=deepspeed", "--deepspeed_config={folder}/zero2.json"],
    "fsdp1 grad_op": ["--engine=fsdp1", "--fsdp1_strategy=grad_op"],
}
OTHER_STRATEGIES = ("hybrid", "none")
CLIP = "--gradient_clipping=0.5"


def begun(rank: int, world: int, folder: Path, output: str, *more: str) -> Run:
    arguments = [*SMALL, *SMALL_APOLLO, f"--data={folder / 'text'}", f"--output={folder / output}", *more]
    return train.set_up(load_settings(arguments), Ranks(rank, world, torch.device("cpu")))


def advance(run: Run, steps: int, *, save: bool = False) -> None:
    for _ in range(steps):
        step.train_step(run)
    if save:
        run.save()
    run.metrics.close()


def message_of(work) -> str:
    try:
        work()
    except (ValueError, SetupError) as error:
        return str(error)
    return "no error"


def moving(rank: int, world: int, folder: Path) -> dict[str, object]:
    advance(begun(rank, world, folder, "stays"), 2 * len(LEGS))
    for number, options in enumerate(LEGS.values()):
        chosen = [word.format(folder=folder) for word in options]
        run = begun(rank, world, folder, "moves", *chosen, *(["--resume"] if number else []))
        assert run.step == 2 * number
        advance(run, 2, save=True)
    advance(begun(rank, world, folder, "clipped", CLIP), 3)
    for strategy in OTHER_STRATEGIES:
        options = ["--engine=fsdp1", f"--fsdp1_strategy={strategy}", CLIP]
        advance(begun(rank, world, folder, strategy, *options), 3)
    found: dict[str, object] = {
        "ddp": message_of(lambda: begun(rank, world, folder, "bad", "--layerwise")),
        "accumulation": message_of(
            lambda: begun(rank, world, folder, "bad", "--layerwise", "--engine=fsdp2", "--micro_batch_size=1")
        ),
    }
    found["loss"] = not_finite(begun(rank, world, folder, "nan", "--layerwise", "--engine=fsdp2"), rank == 1, "loss")
    run = begun(rank, world, folder, "inf", "--layerwise", "--engine=fsdp2")
    found["gradient"] = not_finite(run, rank == 1, "gradient")
    return found


def weights(run: Run) -> torch.Tensor:
    """Those of the optimizer: after a forward pass alone the module shows FSDP2's unsharded copies."""
    return torch.cat([local(p).detach().flatten() for g in run.engine.optimizer.param_groups for p in g["params"]])


def not_finite(run: Run, here: bool, what: str) -> dict[str, object]:
    """Two steps, of which the first has a loss, or gradients alone, that are not finite on one rank."""
    original = llama.token_losses
    bad = spoil if what == "loss" else spoil_gradient
    llama.token_losses = bad(original, lambda: here and run.step == 0)
    found: dict[str, object] = {"moved": [], "error": "none"}
    try:
        for _ in range(2):
            before = weights(run)
            step.train_step(run)
            assert torch.isfinite(weights(run)).all()
            found["moved"].append(not torch.equal(before, weights(run)))
    except SetupError as error:
        found["error"] = str(error)
    finally:
        llama.token_losses = original
    return found


def spoil_gradient(original, when):
    def spoiled(*arguments):
        loss = original(*arguments)
        if when():
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    return spoiled


@pytest.mark.slow
def test_runs_move_between_the_engines_of_two_ranks(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    (tmp_path / "zero2.json").write_text(json.dumps({**ZERO2, "zero_allow_untested_optimizer": True}))
    results = run_ranks(moving, 2, tmp_path)
    stays, moves = losses(tmp_path / "stays"), losses(tmp_path / "moves")
    assert sorted(moves) == list(range(1, 2 * len(LEGS) + 1))
    assert moves == pytest.approx(stays, rel=1e-5)
    clipped = losses(tmp_path / "clipped")
    assert clipped[3] != pytest.approx(stays[3], rel=1e-4)  # so that clipping changes something
    for strategy in OTHER_STRATEGIES:
        assert losses(tmp_path / strategy) == pytest.approx(clipped, rel=1e-5)
    for found in results:
        assert "works in a single process, and there are 2" in found["ddp"]
        assert "takes 2 with micro_batch_size 1" in found["accumulation"]
        assert found["loss"] == {"moved": [False, True], "error": "none"}
        assert found["gradient"]["moved"] == []
        assert "the weights are spoilt: resume from the last checkpoint" in found["gradient"]["error"]


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    return [*SMALL, *SMALL_APOLLO, f"--data={folder / 'text'}", f"--output={folder / output}", *more]


@pytest.mark.usefixtures("one_process")
def test_one_process_takes_the_same_losses_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "text")
    assert main(arguments(tmp_path, "plain")) == 0
    assert main(arguments(tmp_path, "layerwise", "--layerwise", "--checkpoint_every=4", "--stop_after=4")) == 0
    assert "LayerwiseAPOLLO" in capsys.readouterr().out
    assert main(arguments(tmp_path, "layerwise", "--resume", "--engine=fsdp1")) == 0
    assert losses(tmp_path / "layerwise") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", [["--engine=fsdp1"], ["--engine=fsdp2", "--layerwise"]])
def test_the_tiny_recipe_runs(tmp_path: Path, options: list[str]) -> None:
    write_text(tmp_path / "text")
    cut = "--steps=2 --warmup_steps=0 --batch_size=2 --sequence_length=64 --final_eval_sequences=2".split()
    given = [f"--data={tmp_path / 'text'}", f"--output={tmp_path / 'run'}"]
    assert main(["--recipe", "tiny", *cut, *given, *options]) == 0
    assert sorted(losses(tmp_path / "run")) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine=fsdp1"], "--layerwise with --engine fsdp1"),
        (["--gradient_clipping=1"], "--layerwise with gradient_clipping 1.0: the norm of all gradients"),
        (
            ["--optimizer=adamw"],
            "--layerwise is for apollo, apollo-mini, galore, fira, muon, scale, adam-mini, sgd; the optimizer is adamw",
        ),
        (["--fsdp1_strategy=half"], "fsdp1_strategy is 'half': it must be one of full, grad_op, hybrid, none"),
    ],
)
def test_what_does_not_go_together_is_an_error(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings(["--recipe=tiny", "--layerwise", *options])
