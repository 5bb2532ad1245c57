"""Finding the newest good checkpoint, and continuing from it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..distributed import gather_together, rank_of, run_first, run_together, world_of
from . import folder, int8
from .contents import contents
from .shards import read

if TYPE_CHECKING:
    from .opened import Contents

logger = logging.getLogger("apollo_dist")


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and an older one is loaded in its place."""


@dataclass(frozen=True)
class Found:
    """A checkpoint of which every byte was checked.

    Attributes:
        path: its folder.
        step: the step after which it was saved.
        extra: what the caller of ``save`` gave.
        manifest: its description, as plain values.
        problems: what is wrong with newer ones, or with the pointer; one line each.
    """

    path: Path
    step: int
    extra: Any
    manifest: Mapping[str, Any]
    problems: tuple[str, ...] = ()


# What ``load`` returns; the same facts.
Loaded = Found


def find(path: str | os.PathLike[str]) -> Found:
    """The newest good checkpoint in a folder of checkpoints, or the one that ``path`` is. A collective over all ranks.

    Every file is compared with the manifest. If the newest is damaged the one saved before it is tried, and so on;
    that is logged as an error, and the first rank gives a ``CheckpointWarning``, which name the bad files. Of a path
    that is one checkpoint (``.../step_00000100``) nothing else is tried.

    Raises:
        ValueError: on all ranks alike, if there is no good checkpoint; it names the bad files.
    """
    order, problems = run_first(lambda: _order(Path(path)))
    for checkpoint in order:
        # Decided from what all ranks know alike; so all choose the same.
        manifest, bad = run_first(partial(_manifest, checkpoint))
        if not bad:
            mine = dict(sorted(manifest["files"].items())[rank_of() :: world_of()])
            checked = gather_together(partial(folder.check_files, checkpoint, mine))
            bad = sorted({line for part in checked for line in part})
        if not bad:
            extra = run_together(partial(_read_extra, checkpoint))
            found = Found(checkpoint, int(manifest["step"]), extra, manifest, tuple(problems))
            run_together(partial(_tell, found))  # a warning may be an error
            return found
        problems += bad
    what = "; ".join(problems) if problems else f"there is none in {path}"
    raise ValueError(f"no good checkpoint to load: {what}")


def load(path: str | os.PathLike[str] | Found, model: Any, optimizer: Any = None) -> Loaded:
    """Continue from a checkpoint, whatever number of ranks and engine saved it. A collective over all ranks.

    Call it when the model is wrapped (or the engine built) and the optimizer made, before or between steps. Weights,
    optimizer state, frozen parameters, buffers and the options of the parameter groups are those of the checkpoint
    afterwards; under DeepSpeed also the low-precision weights, the counters and the loss scale.

    Learning rate and weight decay follow one rule: each parameter goes on with what it had when it was saved, whatever
    the groups were built with; one log line says so. Options that you want otherwise are set in ``param_groups`` after
    this call. A scheduler is not part of the checkpoint, unless you put its ``state_dict()`` into ``extra``; without
    it a scheduler starts over, and sets its own learning rate at its next step.

    Args:
        path: a folder of checkpoints (the newest good one is taken, see ``find``), one checkpoint, or what ``find``
            returned.
        model: the model as it was wrapped, or the DeepSpeed engine.
        optimizer: APOLLO (or torch's AdamW). None means the engine's; for a model without an engine it loads the
            weights and buffers alone.

    Returns:
        Which checkpoint it was, its step, and ``extra`` as it was saved.

    Raises:
        ValueError: on all ranks alike, if there is no good checkpoint, or if it is of another model or optimizer:
            other names, shapes, low-rank choice, rank or seed.
    """
    found = path if isinstance(path, Found) else find(path)
    opened = contents(model, optimizer, found.manifest)
    run_together(lambda: _fit(opened, found.manifest))
    read(found.path, opened.tensors)
    run_together(lambda: opened.finish_load(found.manifest))
    opened.update_engine(found.manifest, found.step)
    return found


def _fit(opened: Contents, saved: Mapping[str, Any]) -> None:
    opened.check(saved)
    int8.convert(opened, saved["parameters"])


def _order(root: Path) -> tuple[list[Path], list[str]]:
    if folder.is_checkpoint(root):
        return [root], []
    return folder.candidates(root)


def _manifest(checkpoint: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        return folder.read_manifest(checkpoint), []
    except folder.Damaged as damage:
        return {}, [str(damage)]


def _read_extra(checkpoint: Path) -> Any:
    return torch.load(checkpoint / folder.EXTRA, map_location="cpu", weights_only=True)


def _tell(found: Found) -> None:
    if found.problems and rank_of() == 0:
        text = f"{'; '.join(found.problems)}. Falling back to {found.path}, saved after step {found.step}"
        logger.error("%s", text)
        warnings.warn(text, CheckpointWarning, stacklevel=3)
