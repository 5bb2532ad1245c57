"""Damaged, missing and half-written checkpoints: the bad file is named, an older one is loaded, or it is an error."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch

from apollo_dist import checkpoint
from apollo_dist.checkpoint import folder

from ..ranks import run_python
from .checkpoint_kills import build, snapshot, step

ROOT = Path(__file__).resolve().parents[2]
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


# Two files are smaller than the hole.
DAMAGES = [
    (file, damage, word)
    for file in (DATA, ".metadata", "extra.pt", "manifest.json")
    for damage, word in ((flip, "SHA-256"), (hole, "SHA-256"), (truncate, "truncated"), (Path.unlink, "missing"))
    if damage is not hole or file in (DATA, ".metadata")
]


@pytest.mark.parametrize(("file", "damage", "word"), DAMAGES)
def test_damage_is_named_and_an_older_checkpoint_loaded(root, states, file, damage, word, caplog):
    path = root / "step_00000003" / file
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
    with manifest.open("r+b", buffering=0) as file:
        for place, bit in itertools.product(range(0, len(content), 7), range(8)):
            file.seek(place)
            file.write(bytes([content[place] ^ 1 << bit]))
            try:
                read = folder.read_manifest(manifest.parent)
                assert read == good, (place, bit)  # white space, or the case of a checksum's letters
            except ValueError:
                pass
            file.seek(place)
            file.write(content[place : place + 1])


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_python("-m", "tests.checkpoint.checkpoint_kills", str(tmp_path), cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum("killed loaded 1" in line for line in lines) > 20
    assert sum("killed loaded 2" in line for line in lines) >= 2
    assert sum("killed same step 1" in line for line in lines) > 20
    assert sum("finished" in line for line in lines) == 2
