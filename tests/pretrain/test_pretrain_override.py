"""``--resume --override``: what a resumed run may change, what it may not, and that training is then exactly that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR

from apollo_dist.pretrain.__main__ import main
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.distributed import process_group
from apollo_dist.pretrain.engines import native
from apollo_dist.pretrain.metrics import read_rows
from apollo_dist.pretrain.optimizers import schedule
from apollo_dist.pretrain.override import changes
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.train import set_up

from ..pretrain_runs import SMALL, SMALL_APOLLO, ZERO2, rewind, succeed, write_text

pytestmark = pytest.mark.usefixtures("one_process")

Words = list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    write_text(folder / "text")
    assert main(arguments(folder, folder / "run", "--checkpoint_every=4")) == 0
    return folder


def arguments(folder: Path, output: Path, *more: str) -> Words:
    """The small run's, where ``more`` replaces values."""
    replaced = {word.split("=")[0] for word in more}
    kept = [word for word in [*SMALL, *SMALL_APOLLO] if word.split("=")[0] not in replaced]
    return [*kept, f"--data={folder / 'text'}", f"--output={output}", *more]


def fails(capsys: pytest.CaptureFixture[str], given: Words) -> str:
    capsys.readouterr()
    assert main(given) == 2
    return capsys.readouterr().err


def followed(output: Path) -> list[dict[str, float]]:
    """What the rows of a run say of its trajectory."""
    keys = ("step", "loss", "lr", "tokens", "validation_loss")
    return [{key: row[key] for key in keys if key in row} for row in read_rows(output / "metrics.jsonl")]


def test_a_run_goes_on_under_the_new_schedule_bit_for_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    new = ["--steps=12", "--lr=0.005", "--min_lr_ratio=0.5"]
    assert main(arguments(finished, again, *new, "--resume", "--override=steps,lr,min_lr_ratio")) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("overridden from step 5 on: ")]
    assert "steps was 8 and is 12" in line
    assert "optimizer.lr was 0.01 and is 0.005" in line

    def both(config: Config) -> Callable[[torch.optim.Optimizer], LambdaLR]:
        """The old schedule for four steps; 0.01 is twice the new peak, without rounding."""
        old = load_settings(arguments(finished, again)).config

        def factor(step: int) -> float:
            parameter = torch.nn.Parameter(torch.ones(1))
            shape = schedule(old if step < 4 else config)(torch.optim.SGD([parameter], lr=1.0)).lr_lambdas[0]
            return float(shape(step)) * (2 if step < 4 else 1)

        return lambda optimizer: LambdaLR(optimizer, factor)

    monkeypatch.setattr(native, "schedule", both)
    assert main(arguments(finished, tmp_path / "whole", *new)) == 0
    assert len(followed(again)) == len(followed(tmp_path / "whole")) > 12
    assert followed(again) == followed(tmp_path / "whole")
    assert followed(again)[:4] == followed(finished / "run")[:4]
    rates = [row["lr"] for row in followed(again) if "lr" in row]
    assert rates[4] < 0.005 < rates[3]


def test_a_finished_run_is_trained_longer_and_the_new_values_are_kept(finished: Path, tmp_path: Path) -> None:
    again = rewind(finished / "run", tmp_path / "again", 8)
    assert main(arguments(finished, again, "--steps=10", "--resume", "--override=steps", "--checkpoint_every=5")) == 0
    assert followed(again)[: len(followed(finished / "run"))] == followed(finished / "run")
    assert followed(again)[-1]["step"] == 10
    kept = again / "config" / "start-2"
    assert json.loads((kept / "environment.json").read_text())["overridden"] == {"steps": [8, 10]}
    recipe = yaml.safe_load((kept / "recipe.yaml").read_text())
    assert recipe["steps"] == 10
    assert "override" not in recipe
    # The new checkpoint is of a run with the new values: no override any more.
    assert main(arguments(finished, again, "--steps=10", "--resume")) == 0


@pytest.mark.parametrize(
    ("key", "value"), [("weight_decay", 0.5), ("eps", 1e-3), ("scale", 4.0), ("lr", 0.5)]
)  # fmt: skip
def test_options_are_this_runs_after_the_load(finished: Path, tmp_path: Path, key: str, value: float) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    words = [f"--optimizer.{key}={value}", "--resume", f"--override=optimizer.{key}"]
    with process_group(1.0) as ranks:
        run = set_up(load_settings(arguments(finished, again, *words)), ranks)
        groups: list[dict[str, Any]] = run.engine.optimizer.param_groups
        read = "initial_lr" if key == "lr" else key
        assert {group[read] for group in groups if read in group} == {value}
        run.metrics.close()


@pytest.mark.parametrize(
    ("changed", "override", "message"),
    [
        (["--steps=9"], "", "steps was 8 and is 9. Resume with the same values, or allow the new ones: --override"),
        (["--steps=9", "--lr=1"], "steps", "optimizer.lr was 0.01 and is 1.0. Resume with the same values, or allow"),
        (["--steps=3", "--warmup_steps=1"], "steps,warmup_steps", "--steps 3 is less than the 4 steps of "),
        (["--seed=1"], "steps", "seed was 0 and is 1 (projections and the order of the data are drawn from it)"),
        (["--seed=1"], "seed", "--override seed: projections and the order of the data are drawn from it. A resumed"),
        ([], "model.hidden_size", "the weights are those of the old model. A resumed run may change steps, "),
        ([], "optimizer.rank", "moments have the old rank"),
        ([], "data", "the position in the data is one in the old data"),
        ([], "stepps", "no value of a checkpoint has that name"),
    ],
)
def test_what_cannot_be_overridden_says_why(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: Words, override: str, message: str
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    before = (again / "metrics.jsonl").read_text()
    more = [f"--override={override}"] if override else []
    assert message in fails(capsys, arguments(finished, again, *changed, *more, "--resume"))
    assert (again / "metrics.jsonl").read_text() == before


def test_options_of_the_jsons_optimizer_are_keys_of_their_own() -> None:
    facts = {"steps": 8, "optimizer.type": "APOLLO", "optimizer.params": {"lr": 0.1, "rank": 4}}
    lower = {**facts, "optimizer.params": {"lr": 0.05, "rank": 4}}
    (change,) = changes(facts, lower, frozenset({"optimizer.lr"}), 4, "x")
    assert (change.key, change.was, change.now) == ("optimizer.params.lr", 0.1, 0.05)
    with pytest.raises(ValueError, match=r"optimizer.params.lr was 0.1 and is 0.05. .* --override optimizer.lr"):
        changes(facts, lower, frozenset(), 4, "x")
    smaller = {**facts, "optimizer.params": {"lr": 0.1, "rank": 2}}
    with pytest.raises(ValueError, match=r"optimizer.params.rank was 4 and is 2 \(moments have the old rank\)"):
        changes(facts, smaller, frozenset({"optimizer.lr"}), 4, "x")


@pytest.mark.slow
def test_deepspeed_follows_the_new_schedule_too(finished: Path, tmp_path: Path) -> None:
    """Resumed under ZeRO-2 from the same checkpoint, to rounding of fp32 flat partitions."""
    pytest.importorskip("deepspeed")
    new = ["--steps=10", "--lr=0.005", "--resume", "--override=steps,lr"]
    native = rewind(finished / "run", tmp_path / "native", 4)
    assert main(arguments(finished, native, *new)) == 0
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO2))
    moved = rewind(finished / "run", tmp_path / "zero2", 4)
    given = arguments(finished, moved, *new, f"--deepspeed_config={tmp_path / 'zero2.json'}")
    assert "overridden from step 5 on" in succeed("python", 1, given, tmp_path)
    for one, other in zip(followed(moved), followed(native), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_override_needs_resume(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, arguments(finished, tmp_path / "new", "--override=steps"))
    assert "--override steps without --resume" in error
