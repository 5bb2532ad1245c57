"""``--weights int8``: each engine that takes it has the losses of one process, and resumes; others say why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.resolve import resolve
from apollo_dist.pretrain.run import Run
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.step import train_step
from apollo_dist.pretrain.train import set_up
from apollo_dist.weights.int8 import holds_int8

from ..pretrain_runs import SMALL, SMALL_APOLLO, losses, write_text
from ..ranks import run_ranks

pytest.importorskip("torchao", reason="torchao is an extra: pip install 'apollo-dist[quantized]'")

STEPS, HALF = 4, 2
INT8 = ["--weights=int8", "--gradient_clipping=0"]
CASES = {"ddp": [], "fsdp2": [], "fsdp2 layerwise": ["--layerwise"]}
CPU = torch.device("cpu")


def begun(rank: int, world: int, folder: Path, name: str, engine: str, *options: str) -> Run:
    more = [f"--data={folder / 'text'}", f"--output={folder / name}", f"--engine={engine}"]
    return set_up(load_settings([*SMALL, *SMALL_APOLLO, *INT8, *more, *options]), Ranks(rank, world, CPU))


def trained(run: Run, steps: int) -> Run:
    for _ in range(steps):
        train_step(run)
    return run


def recipe_of_12_gb(rank: int, world: int, folder: Path) -> dict[str, object]:
    """Trains a small model by the recipe that fits 7B on 12 GB; what it took of the recipe."""
    small = [option for option in SMALL if "steps" not in option and "batch_size" not in option]
    more = ["--model.vocab_size=256", f"--data={folder / 'text'}", "--tokenizer=none", f"--output={folder / 'recipe'}"]
    settings = load_settings(["--recipe=7B-12GB", *small, *more])
    run = trained(set_up(settings, Ranks(rank, world, CPU)), STEPS)
    facts: dict[str, object] = {"engine": type(run.engine).__name__, "optimizer": type(run.engine.optimizer).__name__}
    return facts | {name: p.dtype for name, p in run.engine.trained.named_parameters() if holds_int8(p)}


def alone(rank: int, world: int, folder: Path) -> dict[str, bool]:
    """Trains one process; which parameters are INT8."""
    run = trained(begun(rank, world, folder, "one", "ddp"), STEPS)
    trained(begun(rank, world, folder, "one layerwise", "ddp", "--layerwise"), STEPS)
    trained(begun(rank, world, folder, "one compiled", "ddp", "--compile"), STEPS)
    switched(folder)
    return {name: holds_int8(p) for name, p in run.engine.trained.named_parameters()}


def switched(folder: Path) -> None:
    """From INT8 to fp32 and back, by checkpoints of the trainer."""
    trained(begun(0, 1, folder, "switched", "ddp"), 1).save()
    more = [f"--data={folder / 'text'}", f"--output={folder / 'switched'}", "--gradient_clipping=0", "--engine=ddp"]
    dense = load_settings([*SMALL, *SMALL_APOLLO, *more, "--resume", "--override=weights"])
    trained(set_up(dense, Ranks(0, 1, CPU)), 1).save()
    trained(begun(0, 1, folder, "switched", "ddp", "--resume", "--override=weights"), STEPS - 2)


def on_ranks(rank: int, world: int, folder: Path) -> None:
    for name, options in CASES.items():
        trained(begun(rank, world, folder, name, name.split()[0], *options), STEPS)
    trained(begun(rank, world, folder, "stopped", "fsdp2"), HALF).save()
    trained(begun(rank, world, folder, "stopped", "fsdp2", "--resume"), STEPS - HALF)


@pytest.mark.slow
def test_losses_are_those_of_one_process_under_every_engine(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    kinds = run_ranks(alone, 1, tmp_path)[0]
    assert all(kind == (".layers." in name and "proj" in name) for name, kind in kinds.items())
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS and expected[STEPS] < expected[1]
    run_ranks(on_ranks, 2, tmp_path)
    # Sums in another order move a code in a hundred thousand.
    for name in ("one layerwise", "one compiled", *CASES):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4), name
    # A step in fp32 between: rounding to codes of 1/127 of a row's largest weight moves a loss by thousandths.
    assert losses(tmp_path / "switched") == pytest.approx(expected, rel=5e-3)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "fsdp2")


def test_the_recipe_of_7b_on_12_gb_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # some CPUs lack instructions of its bf16 kernels
    write_text(tmp_path / "text")
    facts = run_ranks(recipe_of_12_gb, 1, tmp_path)[0]
    assert (facts.pop("engine"), facts.pop("optimizer")) == ("Layerwise", "LayerwiseAPOLLOMini")
    assert len(facts) == 2 * 7 and set(facts.values()) == {torch.bfloat16}
    assert len(losses(tmp_path / "recipe")) == STEPS


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        ("--engine=fsdp1", 2, "fsdp1: it makes one tensor"),
        ("--engine=fsdp2", 1, "fsdp2 on one rank"),
        ("--engine=fsdp2", 3, "do not divide by 3 ranks"),
        ("--precision=bf16", 1, "no fp32 weights"),
        ("--optimizer=adamw", 1, "replicas would drift apart"),
        ("--weights=int4", 1, "weights is 'int4'"),
    ],
)
def test_what_cannot_be_is_refused(options: str, world: int, words: str) -> None:
    given = [option for option in SMALL if not option.startswith("--batch_size")]
    weights = [] if "weights" in options else ["--weights=int8"]
    with pytest.raises(ValueError, match=words):
        resolve(load_settings([*given, "--batch_size=6", *weights, *options.split()]), world)
