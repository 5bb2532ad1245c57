"""A training step: what is communicated, and errors that all ranks hear of before a weight changes."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from apollo_dist.pretrain.__main__ import main
from apollo_dist.pretrain.distributed import Ranks, SetupError
from apollo_dist.pretrain.metrics import read_rows
from apollo_dist.pretrain.optimizers import local
from apollo_dist.pretrain.run import Run
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.step import train_step
from apollo_dist.pretrain.train import set_up, validate

from ..pretrain_runs import SMALL, SMALL_APOLLO, write_text
from ..ranks import run_ranks

WINDOW = 16  # sequence_length of SMALL
BATCH = 4
WINDOWS = 40


def write_tokens(path: Path, training_window: int | None, validation_window: int | None) -> Path:
    """A .bin file of WINDOWS training and 10 validation windows, all tokens 7 but one in each of the given windows."""
    train, held = np.full(WINDOWS * WINDOW + 1, 7, np.uint16), np.full(10 * WINDOW + 1, 7, np.uint16)
    for part, window in ((train, training_window), (held, validation_window)):
        if window is not None:
            part[window * WINDOW + WINDOW // 2] = 300
    train.tofile(path.with_suffix(".train.bin"))
    held.tofile(path.with_suffix(".held.bin"))
    return path


def prepare(rank: int, world: int, data: list[str], output: Path, *more: str) -> Run:
    arguments = [*SMALL, *data, f"--output={output}", *more]
    return set_up(load_settings(arguments), Ranks(rank, world, torch.device("cpu")))


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except SetupError as error:
        return str(error)
    return "no error"


def weights(run: Run) -> torch.Tensor:
    """This rank's shards; the optimizer has them also while FSDP2 has whole parameters in the module."""
    held = [p for group in run.engine.optimizer.param_groups for p in group["params"]]
    return torch.cat([local(p).detach().flatten() for p in held])  # a copy


def rank_main(rank: int, world: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    text = [f"--data={folder / 'text'}"]
    run = prepare(rank, world, text, folder / "ddp", "--engine=ddp", *SMALL_APOLLO, "--micro_batch_size=1")
    reductions = []

    def count(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reductions.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        dist.all_reduce(bucket.buffer())
        done.set_result(bucket.buffer() / world)
        return done

    run.engine._ddp.register_comm_hook(None, count)  # type: ignore[attr-defined]
    for _ in range(3):
        train_step(run)
    found["reductions"] = reductions
    for name in ("training", "validation"):
        path = folder / name
        data = [f"--data={path}.train.bin", f"--data.validation={path}.held.bin"]
        run = prepare(rank, world, data, folder / f"{name}_run", "--engine=fsdp2", *SMALL_APOLLO)
        train_step(run)
        before = weights(run)
        found[name] = error_of(partial(train_step if name == "training" else validate, run))
        found[f"{name} changed weights"] = not torch.equal(weights(run), before)
    resume = ["--resume"] if rank else []
    found["resume"] = error_of(lambda: prepare(rank, world, text, folder / "y", *resume))
    override = ["--resume", "--override=" + ("steps" if rank else "lr")]
    found["override"] = error_of(lambda: prepare(rank, world, text, folder / "y", *override))
    found["rank"] = error_of(lambda: prepare(rank, world, data, folder / "x", "--optimizer.rank=17"))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found; the windows with a token outside of the vocabulary are rank 1's alone."""
    folder = tmp_path_factory.mktemp("step")
    write_text(folder / "text")
    order = np.random.default_rng([0, 0]).permutation(WINDOWS)
    write_tokens(folder / "training", int(order[BATCH + 1]), None)  # sample 1 of the second step
    write_tokens(folder / "validation", None, 2)  # of the windows 0, 2, 4, 6, 8 rank 1 takes 2 and 6
    return run_ranks(rank_main, 2, folder)


def test_ddp_reduces_gradients_in_the_last_micro_batch_only(found: list[dict[str, Any]]) -> None:
    assert found[0]["reductions"] == [0, 0, 0]  # three steps of two micro-batches, one bucket


@pytest.mark.parametrize("key", ["resume", "override"])
def test_ranks_that_differ_in_what_they_resume_all_hear_of_it(found: list[dict[str, Any]], key: str) -> None:
    for one in found:
        assert key in one[key], one[key]
        assert "no good checkpoint" not in one[key]


@pytest.mark.parametrize(("part", "file"), [("training", ".train.bin"), ("validation", ".held.bin")])
def test_bad_data_on_one_rank_is_an_error_on_both(found: list[dict[str, Any]], part: str, file: str) -> None:
    for one in found:
        assert one[part].startswith(f"rank 1: {part} data (")
        assert one[part].endswith(f"{part}{file}) holds token 300, and model.vocab_size is 256")
        assert not one[f"{part} changed weights"]


def test_what_the_optimizer_refuses_is_an_error_on_both(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert "rank 17 is larger than" in one["rank"]


def arguments(folder: Path, *more: str) -> list[str]:
    return [*SMALL, f"--data={write_text(folder / 'text')}", f"--output={folder / 'run'}", *more]


@pytest.mark.usefixtures("one_process")
def test_too_many_losses_that_are_not_finite_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--optimizer=adamw", "--lr=1e30", "--max_skipped_steps=2")) == 2
    printed = capsys.readouterr()
    assert "error: gradients were not finite in 3 steps in a row, up to step 4 with loss " in printed.err
    assert "step 2 left out" in printed.out
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["skipped"]) for row in rows if "skipped" in row] == [(2, 1), (3, 2), (4, 3)]


@pytest.mark.usefixtures("one_process")
def test_half_of_a_launchers_environment_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(arguments(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "MASTER_ADDR" in error


@pytest.mark.usefixtures("one_process")
def test_without_matplotlib_the_run_says_so_and_succeeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(tmp_path, *SMALL_APOLLO, "--stop_after=1")) == 0
    assert "no loss.png: pip install 'apollo-dist[plot]'" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "loss.png").exists()
