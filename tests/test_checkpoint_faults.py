"""Damaged, missing and half-written checkpoints: the bad file is named, an older one is loaded, or it is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apollo_dist import APOLLO, APOLLOMini, checkpoint
from apollo_dist.checkpoint import folder
from apollo_dist.checkpoint.elementwise import _set_number
from apollo_dist.checkpoint.saving import Pending

from .checkpoint_kills import build, snapshot, step
from .models import Bag, groups_of, low_rank
from .ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
DATA = "__0_0.distcp"


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """(folder with the checkpoints of steps 1, 2 and 3, what was saved at each)."""
    root = tmp_path_factory.mktemp("saved")
    model, optimizer = build(seed=0)
    found = {}
    for number in (1, 2, 3):
        step(model, optimizer, number)
        checkpoint.save(root, model, optimizer, {"step": number})
        found[number] = snapshot(model, optimizer)
    return root, found


@pytest.fixture
def root(states, tmp_path):
    """A copy of the checkpoints to damage."""
    return Path(shutil.copytree(states[0], tmp_path / "checkpoints"))


def require(root: Path, states, number: int) -> checkpoint.Loaded:
    """Load, and require that all numbers are those of a step."""
    model, optimizer = build(seed=99)
    found = checkpoint.load(root, model, optimizer)
    loaded = snapshot(model, optimizer)
    assert (found.step, found.extra) == (number, {"step": number})
    assert loaded.keys() == states[1][number].keys()
    assert all(torch.equal(loaded[name], value) for name, value in states[1][number].items())
    return found


def refuse(root: Path, *words: str) -> None:
    """Require that loading is an error with these words, and changes nothing."""
    model, optimizer = build(seed=99)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError) as caught:
        checkpoint.load(root, model, optimizer)
    assert all(word in str(caught.value) for word in words), caught.value
    after = snapshot(model, optimizer)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def hole(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        assert any(file.read(4096))
        file.seek(4096)
        file.write(bytes(4096))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def test_the_newest_is_loaded(root, states):
    assert require(root, states, 3).problems == ()


@pytest.mark.parametrize(
    ("damage", "word"), [(flip, "SHA-256"), (hole, "SHA-256"), (truncate, "truncated"), (Path.unlink, "missing")]
)
@pytest.mark.parametrize("file", [DATA, ".metadata", "extra.pt", "manifest.json"])
def test_damage_is_named_and_an_older_checkpoint_loaded(root, states, file, damage, word, caplog):
    path = root / "step_00000003" / file
    if damage is hole and file in ("extra.pt", "manifest.json"):
        pytest.skip("smaller than the hole")
    damage(path)
    with pytest.warns(checkpoint.CheckpointWarning) as caught:
        found = require(root, states, 2)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert str(path) in told
    assert "Falling back to" in told
    assert "step_00000002" in told
    assert told in caplog.text
    assert any(str(path) in problem for problem in found.problems)
    if file != "manifest.json":
        assert word in told


def test_two_damaged_checkpoints_leave_the_third(root, states):
    flip(root / "step_00000003" / DATA)
    truncate(root / "step_00000002" / "extra.pt")
    with pytest.warns(checkpoint.CheckpointWarning, match="step_00000002/extra.pt"):
        require(root, states, 1)


def test_when_none_is_good_it_is_an_error(root):
    flip(root / "step_00000001" / DATA)
    hole(root / "step_00000002" / DATA)
    (root / "step_00000003" / DATA).unlink()
    refuse(root, "no good checkpoint", f"step_00000001/{DATA}", f"step_00000002/{DATA}", f"step_00000003/{DATA}")


def test_when_there_is_none_it_is_an_error(tmp_path):
    refuse(tmp_path / "nothing", "no good checkpoint", "nothing")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no good checkpoint", "empty")


def test_one_named_checkpoint_is_loaded_or_nothing(root, states):
    assert require(root / "step_00000001", states, 1).problems == ()
    flip(root / "step_00000001" / DATA)
    refuse(root / "step_00000001", f"step_00000001/{DATA}")


def test_every_bit_of_the_manifest_counts(root):
    manifest = root / "step_00000001" / "manifest.json"
    good, content = folder.read_manifest(manifest.parent), manifest.read_bytes()
    for place in range(0, len(content), 7):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            manifest.write_bytes(bytes(damaged))
            try:
                read = folder.read_manifest(manifest.parent)
            except ValueError:
                continue
            assert read == good, (place, bit)  # white space, or the case of a checksum's letters


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (Path.unlink, "latest is missing"),
        (lambda path: path.write_text(""), "latest is empty"),
        (lambda path: path.write_text("\n"), "latest is empty"),
        (lambda path: path.write_text("step_00000099\n"), "names 'step_00000099'"),
        (lambda path: path.write_text("../../etc\n"), "names '../../etc'"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "latest cannot be read"),
    ],
    ids=["missing", "empty", "blank", "to nothing", "outside", "not text"],
)
def test_without_a_pointer_the_last_saved_is_loaded(root, states, damage, word):
    damage(root / "latest")
    with pytest.warns(checkpoint.CheckpointWarning, match=word):
        require(root, states, 3)


def test_an_older_pointer_is_obeyed_and_the_other_checkpoints_follow(root, states):
    """As a process leaves it that dies before it moves the pointer; the newer one is complete as well."""
    folder.point_to(root, "step_00000002")
    assert require(root, states, 2).problems == ()
    flip(root / "step_00000002" / DATA)
    with pytest.warns(checkpoint.CheckpointWarning, match="Falling back to .*step_00000003"):
        require(root, states, 3)


def test_the_last_saved_and_not_the_largest_step_comes_first(root, states):
    """After a run was taken up at an older step, its checkpoints are the newer ones."""
    model, optimizer = build(seed=99)
    checkpoint.load(root / "step_00000001", model, optimizer)
    checkpoint.save(root, model, optimizer, {"step": 1})
    assert (root / "latest").read_text() == "step_00000001_2\n"
    (root / "latest").unlink()
    with pytest.warns(checkpoint.CheckpointWarning, match="step_00000001_2"):
        require(root, states, 1)


def test_old_checkpoints_are_deleted(root):
    model, optimizer = build(seed=0)
    checkpoint.save(root, model, optimizer, step=5, keep=3)
    assert sorted(os.listdir(root)) == ["latest", "step_00000002", "step_00000003", "step_00000005"]
    checkpoint.load(root / "step_00000002", model, optimizer)
    checkpoint.save(root, model, optimizer, step=4, keep=2)  # and those of a run that was abandoned
    assert sorted(os.listdir(root)) == ["latest", "step_00000003", "step_00000004"]
    checkpoint.save(root, model, optimizer, step=4, keep=1)
    assert sorted(os.listdir(root)) == ["latest", "step_00000004_2"]


def test_a_save_that_fails_leaves_the_others(root, states):
    """Its folder cannot be made."""
    (root / ".draft_step_00000007").write_text("in the way")
    model, optimizer = build(seed=0)
    with pytest.raises((ValueError, OSError)):
        checkpoint.save(root, model, optimizer, step=7)
    assert require(root, states, 3).problems == ()


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """Killed at each of its file operations, and in the middle of writing a file."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint_kills", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum("killed loaded 1" in line for line in lines) > 20
    assert sum("killed loaded 2" in line for line in lines) >= 2
    assert sum("killed same step 1" in line for line in lines) > 20
    assert sum("finished" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("build_other", "words"),
    [
        (lambda m: APOLLO(groups_of(m, low_rank(m, 3)), seed=1), ("seed of the projections is 0, and here it is 1",)),
        (lambda m: APOLLO(groups_of(m, low_rank(m, 2))), ("rank of layers.", "was 3, and here it is 2")),
        (lambda m: APOLLO(groups_of(m, {**low_rank(m, 3), "embed.linear.weight": 2})), ("kind of embed",)),
        (lambda m: torch.optim.AdamW(m.parameters()), ("its optimizer is APOLLO, and here it is AdamW",)),
    ],
    ids=["seed", "rank", "choice", "optimizer"],
)  # fmt: skip
def test_another_optimizers_checkpoint_is_an_error(root, build_other, words):
    model = Bag(99)
    with pytest.raises(ValueError) as caught:
        checkpoint.load(root, model, build_other(model))
    assert all(word in str(caught.value) for word in words), caught.value


def test_another_models_checkpoint_is_an_error(root):
    model = Bag(99, experts=False)
    model.layers[0].norm = torch.nn.Parameter(torch.ones(8))
    model.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError) as caught:
        checkpoint.load(root, model, APOLLO(groups_of(model, low_rank(model, 3))))
    for words in (
        "it has no extra",
        f"its layers.{len(model.layers)}.weight is not in the model",
        "shape of layers.0.norm was [7]",
    ):
        assert words in str(caught.value)


def test_a_parameter_without_a_name_is_an_error(tmp_path):
    model = Bag()
    optimizer = APOLLO([{"params": [p for p in model.parameters() if p.dim() == 2], "rank": 1}])
    with pytest.raises(ValueError, match="knows a parameter as param_0, which is no name of the model's"):
        checkpoint.save(tmp_path, model, optimizer)


def test_what_cannot_be_read_back_is_refused_when_saving(tmp_path):
    model, optimizer = build(seed=0)
    with pytest.raises(ValueError, match="extra may hold numbers"):
        checkpoint.save(tmp_path, model, optimizer, {"model": model})
    with pytest.raises(ValueError, match="keep must be an integer >= 1"):
        checkpoint.save(tmp_path, model, optimizer, keep=0)
    assert not any(tmp_path.iterdir())


def test_an_optimizer_whose_state_is_not_known_is_refused(tmp_path):
    model = Bag()
    with pytest.raises(ValueError, match=r"torch's AdamW, Adam without amsgrad; the optimizer is torch.optim.sgd.SGD"):
        checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="pass the optimizer that trains the model, got NoneType"):
        checkpoint.save(tmp_path, model)
    with pytest.raises(ValueError, match="is not in the model"):
        checkpoint.save(tmp_path, model, torch.optim.AdamW(Bag().parameters()))


def test_counts_that_must_be_one_and_are_not(tmp_path):
    """Under ZeRO the parameters of a group share a count; where it was saved each may have had its own."""
    state = {"step": torch.tensor(0.0)}
    with pytest.raises(ValueError, match=r"the step of a, b differ \(b: 3.0\), and here they share one"):
        _set_number(state, "step", {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])})


def test_loading_into_less_precision_is_told(tmp_path, caplog):
    model, optimizer = build(seed=0)
    checkpoint.save(tmp_path, model, optimizer)
    low = Bag(99).bfloat16()
    checkpoint.load(tmp_path, low, APOLLO(groups_of(low, low_rank(low, 3)), update_proj_gap=3))
    assert f"{len(list(low.parameters()))} tensors lose precision, such as" in caplog.text
    assert "float32 in the checkpoint, bfloat16 here" in caplog.text
    for (name, p), q in zip(model.named_parameters(), low.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q), name


def test_mini_continues_exactly(tmp_path):
    """Tensor scaling, rank 1, and options that were changed after construction."""
    runs = []
    for number in range(2):
        model = Bag(number)
        optimizer = APOLLOMini([g | {"rank": g["rank"] and 1} for g in groups_of(model, low_rank(model, 1))])
        if number == 0:
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.param_groups[1]["weight_decay"] = 0.3
            step(model, optimizer, 0)
            checkpoint.save(tmp_path, model, optimizer)
        else:
            checkpoint.load(tmp_path, model, optimizer)
        step(model, optimizer, 1)
        runs.append(snapshot(model, optimizer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_in_the_background_what_was_is_saved(tmp_path):
    """Training goes on while it is written, and does not show in it; and a save waits for the one before."""
    model, optimizer = build(seed=0)
    found, pending = {}, []
    for number in (1, 2, 3):
        step(model, optimizer, number)
        pending.append(checkpoint.save(tmp_path, model, optimizer, {"step": number}, background=True))
        assert isinstance(pending[-1], Pending)
        found[number] = snapshot(model, optimizer)
        step(model, optimizer, 10 + number)
    assert pending[0].done()
    assert [p.wait().name for p in pending] == ["step_00000001", "step_00000003", "step_00000005"]
    for number, path in zip((1, 2, 3), sorted(tmp_path.glob("step_*")), strict=True):
        loaded_model, loaded_optimizer = build(seed=99)
        assert checkpoint.load(path, loaded_model, loaded_optimizer).extra == {"step": number}
        loaded = snapshot(loaded_model, loaded_optimizer)
        assert all(torch.equal(loaded[name], value) for name, value in found[number].items())


def test_a_failure_in_the_background_is_told(root, caplog):
    model, optimizer = build(seed=0)
    (root / ".draft_step_00000007").write_text("in the way")
    pending = checkpoint.save(root, model, optimizer, step=7, background=True)
    with pytest.raises((ValueError, OSError)):
        pending.wait()
    assert "saving a checkpoint in the background failed" in caplog.text
    with pytest.raises((ValueError, OSError)):
        checkpoint.save(root, model, optimizer, step=8)
    (root / ".draft_step_00000007").unlink()
    assert checkpoint.save(root, model, optimizer, step=9) == root / "step_00000009"


def background_kill(rank, world, root):
    """Save twice; in the second, in the background, rank 1 is killed before it opens its file."""
    model, optimizer = build(seed=0)
    step(model, optimizer, 0)
    checkpoint.save(root, model, optimizer, {"step": 1})
    step(model, optimizer, 1)

    def hook(event, arguments):
        if event == "open" and str(arguments[0]).endswith("__1_0.distcp"):
            os.kill(os.getpid(), 9)

    sys.addaudithook(hook)
    checkpoint.save(root, model, optimizer, {"step": 2}, background=True).wait()


def after_kill(rank, world, root):
    model, optimizer = build(seed=99)
    found = checkpoint.load(root, model, optimizer)
    return found.step, found.problems, os.listdir(root)


@pytest.mark.slow
def test_a_rank_killed_in_a_background_save_loses_nothing_older(tmp_path):
    with pytest.raises(AssertionError):
        run_ranks(background_kill, 2, str(tmp_path))
    for found in run_ranks(after_kill, 2, str(tmp_path)):
        assert found[:2] == (1, ())
