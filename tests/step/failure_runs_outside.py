"""Failures injected outside of steps: into loads, checkpoints, and the building of optimizers and groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from apollo_dist import checkpoint, layerwise
from apollo_dist.checkpoint import contents, folder, loading, opened, saving, shards
from apollo_dist.optimizers import construction, grouped, in_backward, members, parts
from apollo_dist.optimizers import layerwise as updates_in_backward
from apollo_dist.state import loaded, parameter_state

from ..models import Bag, gradients, groups_of, low_rank, shapes_of
from ..sharded import fsdp2
from .failure_runs import OPTIONS, RANK, SHAPES, STEPPING, STEPS, Native, Place, attempt


def others(rank: int, world: int, root: str) -> dict[str, str]:
    """What is wrong with failures outside of steps, by place and rank: loads, checkpoints, new groups."""
    run = Native("fsdp2", rank, world)
    run.backward()
    run.step()
    extra = nn.Parameter(torch.zeros(4).double())
    checkpoint.save(f"{root}/before", run.model, run.optimizer, step=1)

    wrong = {}
    for call, (work, places) in _calls(run, extra, rank, world, root).items():
        for place in places:
            for culprit in range(world):
                found = attempt(work, place, culprit, torch.OutOfMemoryError, rank)
                if found:
                    wrong[f"{place[1]} in {call} on rank {culprit}"] = found
    # After all that, training goes on where it was.
    checkpoint.load(f"{root}/before", run.model, run.optimizer)
    run.stepped()
    for _ in range(STEPS):
        run.backward()
        run.step()
        run.stepped()
    if run.error() > 1e-9:
        wrong["training afterwards"] = f"off by {run.error():.1e}"
    return wrong


def _in_backward(world: int) -> None:
    model = Bag(shapes=SHAPES).double()
    shapes = shapes_of(model)
    wrapped = fsdp2(model, "", world)
    optimizer = layerwise.attach(wrapped, groups_of(wrapped, low_rank(model, RANK)), **OPTIONS)
    wrapped(gradients(shapes, 0, 0)).backward()
    optimizer.step()


def _calls(
    run: Native, extra: nn.Parameter, rank: int, world: int, root: str
) -> dict[str, tuple[Callable[[], Any], list[Place]]]:
    """What is called, and the places in which each call fails."""
    saved = run.optimizer.state_dict()

    def load() -> None:
        run.optimizer.load_state_dict(saved)
        run.backward()
        run.step()

    def in_background() -> None:
        with contextlib.suppress(BaseException):  # the failure of the save before, which a save raises first
            saving._last.wait()
        saving._last = None
        checkpoint.save(f"{root}/background", run.model, run.optimizer, step=1, background=True).wait()

    return {
        "load_state_dict": (
            load,
            [(loaded, "copied", 1), (parameter_state, "_restore_elements", 1), (parameter_state, "_fitting", 2)],
        ),
        "building": (
            lambda: Native("fsdp2", rank, world),
            [(construction, "validate_options", 1), (members, "param_info", 2), (parts, "fingerprint", 1)],
        ),
        "add_param_group": (
            lambda: run.optimizer.add_param_group({"params": [("extra", extra)]}),
            [(grouped, "validate_options", 1), (members, "check_no_duplicates", 1), (parts, "fingerprint", 1)],
        ),
        "save": (
            lambda: checkpoint.save(f"{root}/other", run.model, run.optimizer, step=1),
            [(contents, "_add_matrix", 1), (saving, "_check", 1), (folder, "describe_files", 1)],
        ),
        "save in the background": (in_background, [(shards.Shards, "staged", 1), (folder, "describe_files", 1)]),
        "load": (
            lambda: checkpoint.load(f"{root}/before", run.model, run.optimizer),
            [(loading, "_tell", 1), (contents, "_add_adam", 1), (folder, "check_files", 1),
             (opened, "restore_options", 1)],
        ),
        "inside backward": (
            lambda: _in_backward(world),
            [(updates_in_backward, "check_model", 1), (in_backward, "check_parameter", 2),
             (*STEPPING["projecting"][:2], 1)],
        ),
    }  # fmt: skip
