"""Damaged, foreign and missing checkpoints, in one process: every one is an error that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from apollo_dist.checkpoint import CheckpointWarning
from apollo_dist.pretrain.__main__ import main
from apollo_dist.pretrain.metrics import read_rows

from ..pretrain_runs import SMALL, SMALL_APOLLO, losses, rewind, write_text

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    write_text(folder / "text")
    assert main(arguments(folder, folder / "run", "--checkpoint_every=4")) == 0
    return folder


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [*SMALL, *SMALL_APOLLO, f"--data={folder / 'text'}", f"--output={output}", *more]


def fails(folder: Path, output: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Require that the run ends with an error, and return it."""
    capsys.readouterr()
    assert main(arguments(folder, output, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    return error


def test_a_checkpoint_is_listed_and_nothing_is_left_over(finished: Path) -> None:
    folder = finished / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000004", "step_00000008"]
    assert (folder / "latest").read_text() == "step_00000008\n"
    manifest = json.loads((folder / "step_00000004" / "manifest.json").read_text())
    inside = (path for path in (folder / "step_00000004").rglob("*") if path.is_file())
    present = {path.relative_to(folder / "step_00000004").as_posix() for path in inside}
    assert set(manifest["files"]) | {"manifest.json"} == present
    assert manifest["step"] == 4
    assert "hf/config.json" in present


def test_a_resumed_run_repeats_the_losses_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    assert main(arguments(finished, again, "--resume")) == 0
    kept = [{k: v for k, v in row.items() if k in ("step", "loss", "lr", "tokens", "validation_loss")}
            for row in read_rows(again / "metrics.jsonl")]  # fmt: skip
    expected = [{k: v for k, v in row.items() if k in ("step", "loss", "lr", "tokens", "validation_loss")}
                for row in read_rows(finished / "run" / "metrics.jsonl")]  # fmt: skip
    assert kept == expected


def test_a_finished_run_resumes_to_its_summary(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 8)
    before = (again / "metrics.jsonl").read_text()
    assert main(arguments(finished, again, "--resume")) == 0
    assert (again / "metrics.jsonl").read_text() == before
    assert "validation loss" in capsys.readouterr().out.split("summary:")[1]


def test_metrics_after_the_checkpoint_and_half_a_line_are_dropped(finished: Path, tmp_path: Path) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert main(arguments(finished, again, "--resume", "--stop_after=5")) == 0
    assert sorted(losses(again)) == [1, 2, 3, 4, 5]
    assert losses(again)[5] == losses(finished / "run")[5]


def test_old_checkpoints_are_deleted(finished: Path, tmp_path: Path) -> None:
    assert main(arguments(finished, tmp_path / "run", "--checkpoint_every=2", "--keep_checkpoints=1")) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000008"]


def test_resuming_an_older_step_replaces_the_newer_checkpoints(finished: Path, tmp_path: Path) -> None:
    again = shutil.copytree(finished / "run", tmp_path / "again")
    (again / "checkpoints" / "latest").write_text("step_00000004\n")  # as if killed before the pointer moved
    assert main(arguments(finished, again, "--resume", "--checkpoint_every=4")) == 0
    assert (again / "checkpoints" / "latest").read_text() == "step_00000008_2\n"
    assert not (again / "checkpoints" / "step_00000008").exists()
    assert losses(again) == losses(finished / "run")


def test_a_new_run_refuses_an_old_runs_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(finished, finished / "run", capsys)
    assert "has checkpoints up to step_00000008: pass --resume" in error
    assert "another --output" in error


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("__0_0.distcp", Path.unlink, "is missing"),
        ("__0_0.distcp", truncate, "is truncated"),
        ("__0_0.distcp", flip, "SHA-256"),
        (".metadata", flip, "SHA-256"),
        ("extra.pt", flip, "SHA-256"),
        ("manifest.json", Path.unlink, "is missing"),
        ("manifest.json", truncate, "is damaged"),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    damage(again / "checkpoints" / "step_00000004" / file)
    before = (again / "metrics.jsonl").read_text()
    error = fails(finished, again, capsys, "--resume")
    assert file in error
    assert message in error
    assert (again / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_is_an_error(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(finished, tmp_path / "nothing", capsys, "--resume")
    assert "no good checkpoint to load" in error
    assert str(tmp_path / "nothing" / "checkpoints") in error
    assert not (tmp_path / "nothing" / "metrics.jsonl").exists()


@pytest.mark.parametrize("target", ["step_00000099", "", "../../etc", None])
def test_a_pointer_to_nothing_is_told_and_the_last_checkpoint_taken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str | None
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    pointer = again / "checkpoints" / "latest"
    pointer.unlink() if target is None else pointer.write_text(target)
    with pytest.warns(CheckpointWarning, match="latest"):
        assert main(arguments(finished, again, "--resume")) == 0
    printed = capsys.readouterr().out
    assert str(pointer) in printed
    assert "resumed after step 4" in printed
    assert losses(again) == losses(finished / "run")


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Path(shutil.copytree(finished / "run", tmp_path / "again"))
    damaged = again / "checkpoints" / "step_00000008" / "__0_0.distcp"
    flip(damaged)
    with pytest.warns(CheckpointWarning, match=str(damaged)):
        assert main(arguments(finished, again, "--resume")) == 0
    assert f"{damaged} is damaged" in capsys.readouterr().out
    assert losses(again) == losses(finished / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--seed=1", "seed was 0 and is 1"),
        ("--lr=0.5", "optimizer.lr was 0.01 and is 0.5"),
        ("--steps=9", "steps was 8 and is 9"),
        ("--optimizer.rank=2", "optimizer.rank was 4 and is 2"),
    ],
)
def test_another_runs_checkpoint_is_an_error(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    given = [word for word in arguments(finished, again, "--resume") if word.split("=")[0] != change.split("=")[0]]
    capsys.readouterr()
    assert main([*given, change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("background", [False, True])
def test_a_run_may_move_to_another_engine_and_micro_batch(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], background: bool
) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    moved = ["--resume", "--engine=fsdp2", "--micro_batch_size=2", "--checkpoint_every=2"]
    assert main(arguments(finished, again, *moved, f"--background_checkpoints={background}")) == 0
    assert "the run moved (engine ddp -> fsdp2, micro_batch_size 4 -> 2)" in capsys.readouterr().out
    assert losses(again) == pytest.approx(losses(finished / "run"), rel=1e-5)
    names = sorted(path.name for path in (again / "checkpoints").iterdir())
    assert names == ["latest", "step_00000006", "step_00000008"]


def test_changed_data_is_an_error(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    shutil.copytree(finished / "text", tmp_path / "text")
    (tmp_path / "text" / "text_0.txt").write_text("other text " * 300)
    assert "data was" in fails(tmp_path, again, capsys, "--resume")


def test_a_draft_of_a_dead_process_is_ignored(finished: Path, tmp_path: Path) -> None:
    again = rewind(finished / "run", tmp_path / "again", 4)
    draft = again / "checkpoints" / ".draft_step_00000008"
    draft.mkdir()
    (draft / "weights.pt").write_bytes(b"half")
    assert main(arguments(finished, again, "--resume", "--checkpoint_every=4")) == 0
    assert not draft.exists()
    assert losses(again) == losses(finished / "run")


def test_metrics_that_are_damaged_inside_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_rows(path)
    path.write_text('{"step": 1}\n{"st')
    assert read_rows(path) == [{"step": 1}]


@pytest.mark.parametrize("optimizer", ["apollo-mini", "adamw"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_other_optimizers_resume_exactly(finished: Path, tmp_path: Path, engine: str, optimizer: str) -> None:
    # Under FSDP2 AdamW's state is DTensors.
    given = [word for word in arguments(finished, tmp_path / "run") if not word.startswith("--optimizer.")]
    given += [f"--engine={engine}", f"--optimizer={optimizer}", "--gradient_clipping=0.5"]
    assert main([*given, "--checkpoint_every=4"]) == 0
    rewind(tmp_path / "run", tmp_path / "again", 4)
    assert main([*(w.replace(str(tmp_path / "run"), str(tmp_path / "again")) for w in given), "--resume"]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
