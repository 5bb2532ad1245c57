"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from apollo_dist import checkpoint
from apollo_dist.checkpoint.saving import Pending

from ..ranks import run_ranks
from .checkpoint_kills import build, snapshot, step


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


def test_a_failure_in_the_background_is_told(tmp_path, caplog):
    model, optimizer = build(seed=0)
    (tmp_path / ".draft_step_00000007").write_text("in the way")
    pending = checkpoint.save(tmp_path, model, optimizer, step=7, background=True)
    with pytest.raises((ValueError, OSError)):
        pending.wait()
    assert "saving a checkpoint in the background failed" in caplog.text
    with pytest.raises((ValueError, OSError)):
        checkpoint.save(tmp_path, model, optimizer, step=8)
    (tmp_path / ".draft_step_00000007").unlink()
    assert checkpoint.save(tmp_path, model, optimizer, step=9) == tmp_path / "step_00000009"


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
