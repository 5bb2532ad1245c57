"""Writing a checkpoint, at once or in the background."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .._version import __version__
from ..distributed import check_same_on_all_ranks, gather_together, rank_of, run_first, run_together, world_of
from ..optimizers.options import plain
from . import folder, hub
from .contents import contents
from .shards import Shards, write

if TYPE_CHECKING:
    from .opened import Contents

logger = logging.getLogger("apollo_dist")

# Background saves run here one after the other, and talk over a group of their own, which training never uses.
_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apollo-checkpoint")
_group: tuple[object, dist.ProcessGroup] | None = None
_last: Pending | None = None


class Pending:
    """A save in the background."""

    def __init__(self, future: Future[Path]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def wait(self) -> Path:
        """Wait for its end: the folder of the finished checkpoint.

        Raises:
            ValueError, OSError or RankError: on all ranks, as of ``save``; checkpoints before it are as they were.
        """
        return self._future.result()


def save(
    path: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    extra: Any = None,
    *,
    step: int | None = None,
    keep: int | None = None,
    background: bool = False,
    tokenizer: Any = None,
) -> Path | Pending:
    """Save a model and its optimizer into a new folder ``path/step_XXXXXXXX``. A collective over all ranks.

    Each rank writes what it owns, and what several ranks hold is written once. The checkpoint appears whole or not at
    all; one that is there already is never touched before the new one is durable.

    Args:
        path: the folder of checkpoints, on storage that all ranks share.
        model: the model as it was wrapped, or the DeepSpeed engine.
        optimizer: APOLLO (or torch's AdamW); None means the engine's.
        extra: what else to keep, such as a scheduler's ``state_dict()`` and the position in the data: numbers,
            strings, tensors, lists and dicts of them. The first rank's is kept.
        step: the step after which this is, which names the folder. None means the engine's count, or the optimizer's.
        keep: how many checkpoints to keep; older ones are deleted once the new one is durable, and so are those of
            later steps, which an abandoned run left. None keeps all.
        background: copy everything to CPU memory, and write it while training goes on. A save waits for the one
            before it, and raises if that failed. Before the process ends, call ``wait``.
        tokenizer: a Hugging Face tokenizer to keep with the checkpoint, for ``export``.

    Returns:
        The finished checkpoint's folder, or with ``background`` a ``Pending``.

    Raises:
        ValueError: on all ranks alike, if something cannot be saved or written. Where that happens on one rank only, it
            raises its own error (OSError for a full disk, say), and the others a RankError, which is a ValueError.
    """
    global _last
    before, _last = _last, None
    if before is not None:
        before.wait()
    found = contents(model, optimizer)
    counted = _steps_of(found)
    step, keep = counted if step is None else plain(step), plain(keep)
    run_together(lambda: _check(step, keep))
    check_same_on_all_ranks({"step": step, "keep": keep, "background": background, "what is saved": found.description})
    module = model if found.engine is None else model.module
    # The first rank's, which writes them; all hear of a failure.
    files = run_together(lambda: {folder.EXTRA: _pack(extra), **hub.files(module, tokenizer)} if rank_of() == 0 else {})
    versions = {"apollo_dist": __version__, "torch": torch.__version__}
    manifest = {"step": step, "ranks": world_of(), **versions, **found.description}
    if not background:
        return _write(Path(path), found.tensors, manifest, files, keep, None)
    staged = run_together(lambda: {key: shards.staged() for key, shards in found.tensors.items()})
    arguments = (Path(path), staged, manifest, files, keep, _background_group())
    _last = Pending(_executor.submit(_write_or_log, *arguments))
    return _last


def _steps_of(found: Contents) -> int:
    """How many steps the engine, or else the optimizer, has counted; a collective."""

    def counted() -> int:
        if found.engine is not None:
            return int(found.description["engine"]["global_steps"])
        counts = [
            shards.pieces[0].tensor
            for key, shards in found.tensors.items()
            if key.startswith("optimizer.") and key.endswith(".step")
        ]
        return max((int(count) for count in counts), default=0)

    return max(gather_together(counted))


def _write_or_log(*arguments: Any) -> Path:
    """``_write``, whose failure is told at once, and not only to who waits for it."""
    try:
        return _write(*arguments)
    except Exception as error:
        logger.error("saving a checkpoint in the background failed: %s", error)
        raise


def _write(
    root: Path,
    tensors: dict[str, Shards],
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    keep: int | None,
    group: dist.ProcessGroup | None,
) -> Path:
    """Draft, manifest, rename, pointer; collective over ``group``."""
    step = int(manifest["step"])
    draft = run_first(lambda: folder.start_draft(root, step), group)
    write(draft, tensors, group)

    def complete() -> list[str]:
        for name, content in files.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(content)
        return folder.list_files(draft)

    names = run_first(complete, group)
    mine = names[rank_of(group) :: world_of(group)]
    described = gather_together(lambda: folder.describe_files(draft, mine), group)
    listed = {name: entry for part in described for name, entry in part.items()}

    def commit() -> Path:
        folder.write_manifest(draft, {**manifest, "sequence": folder.next_sequence(root), "files": listed})
        return folder.publish(draft, step, keep)

    return run_first(commit, group)


def _pack(extra: Any) -> bytes:
    """``extra`` as bytes that ``torch.load`` reads with ``weights_only``: found out now, not when resuming."""
    buffer = io.BytesIO()
    try:
        torch.save(extra, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise ValueError(
            "extra may hold numbers, strings, tensors, and lists, tuples and dicts of them; it could not be read "
            f"back: {error}"
        ) from error
    return buffer.getvalue()


def _check(step: int, keep: int | None) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be an integer >= 1, or None for all checkpoints, got {keep!r}")


def _background_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for background saves; made once, collectively."""
    global _group
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    if _group is None or _group[0] is not world:
        made = dist.new_group(backend="gloo")
        assert made is not None
        _group = (world, made)
    return _group[1]
