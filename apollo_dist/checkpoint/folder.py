"""Folders of checkpoints in which each one is complete or absent; everything here is local to one process.

::

    ROOT/latest                   the name of the newest checkpoint; replaced atomically
    ROOT/step_00000100/
        manifest.json             what it is, and every other file with its size and SHA-256; written last
        .metadata, __0_0.distcp   weights and optimizer state, in DCP's format
        extra.pt                  what the caller gave
        hf/                       the model's configuration and tokenizer, where there are any
    ROOT/.draft_step_00000200/    being written, or left by a process that died

A checkpoint is written into a draft, made durable, and renamed; then the pointer is replaced. A process that dies on
the way leaves the checkpoint before it as the newest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LATEST = "latest"
EXTRA = "extra.pt"
FORMAT = 1

_NAME = re.compile(r"step_(\d{8,})(?:_(\d+))?")


class Damaged(ValueError):
    """A file of a checkpoint is missing or is not as it was written; the message names it."""


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is one checkpoint, judged by its name, and not a folder of several."""
    return _NAME.fullmatch(path.name) is not None


def existing(root: Path) -> list[Path]:
    """The checkpoints in a folder, damaged or not, by step."""
    found = [path for path in root.iterdir() if is_checkpoint(path) and path.is_dir()] if root.is_dir() else []
    return sorted(found, key=_place)


def start_draft(root: Path, step: int) -> Path:
    """An empty draft for a step; drafts that dead processes left are removed."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".draft_*"):
        shutil.rmtree(old)
    draft = root / f".draft_step_{step:08d}"
    draft.mkdir()
    return draft


def list_files(folder: Path) -> list[str]:
    """Paths of all files below ``folder``, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    """Make files durable, and return the size and SHA-256 of each."""
    entries: dict[str, dict[str, object]] = {}
    for name in names:
        path = folder / name
        sync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entries


def check_files(folder: Path, files: Mapping[str, Mapping[str, object]]) -> list[str]:
    """What is wrong with the files that a manifest lists: one line for each bad file."""
    problems = []
    for name, wanted in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                problems.append(f"{path} has {size} bytes, not {wanted['bytes']}: it is truncated or overwritten")
            elif sha256(path) != wanted["sha256"]:
                problems.append(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error}")
    return problems


def write_manifest(draft: Path, contents: Mapping[str, Any]) -> None:
    """Write the manifest of a finished draft, with a checksum of its own, and make the draft durable."""
    contents = {"format": FORMAT, **contents}
    text = json.dumps({**contents, "checksum": _checksum(contents)}, indent=1, sort_keys=True)
    _write_durably(draft / MANIFEST, text + "\n")
    for folder in [draft, *(path for path in draft.rglob("*") if path.is_dir())]:
        sync(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        Damaged: if it is missing or not as it was written.
        ValueError: if another version of this package wrote it, in a format that this one does not read.
    """
    path = checkpoint / MANIFEST
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        checksum, layout = contents.pop("checksum"), contents["format"]
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing: the checkpoint was never finished, or lost it") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if checksum != _checksum(contents):
        raise Damaged(f"{path} is damaged: it does not match its own checksum")
    if layout != FORMAT:
        raise ValueError(f"{path} has checkpoint format {layout}; this version reads {FORMAT}")
    return dict(contents)


def publish(draft: Path, step: int, keep: int | None) -> Path:
    """Rename a finished draft, point ``latest`` at it, and delete what is too old: in this order, each step durable.

    Args:
        draft: the finished draft of a step.
        step: which one. If there is a checkpoint of it already, the new one is called ``step_00000100_2``: taking the
            old one's name would leave a moment without either.
        keep: how many checkpoints of this run to keep, or None for all. Those of this and later steps are of a run
            that was abandoned, and are not kept.
    """
    root = draft.parent
    others = existing(root)
    times = [_place(path)[1] for path in others if _place(path)[0] == step]
    final = root / (f"step_{step:08d}" + (f"_{max(times) + 1}" if times else ""))
    draft.rename(final)
    sync(root)
    point_to(root, final.name)
    if keep is not None:
        older = [path for path in others if _place(path)[0] < step]
        abandoned = [path for path in others if _place(path)[0] >= step]
        for path in [*abandoned, *older[: max(0, len(older) + 1 - keep)]]:
            # Renamed first: a checkpoint that is half deleted would pass for a damaged one.
            gone = root / f".draft_deleted_{path.name}"
            path.rename(gone)
            shutil.rmtree(gone)
    return final


def point_to(root: Path, name: str) -> None:
    """Replace the pointer to the newest checkpoint, atomically and durably."""
    temporary = root / f".{LATEST}"
    _write_durably(temporary, name + "\n")
    os.replace(temporary, root / LATEST)
    sync(root)


def next_sequence(root: Path) -> int:
    """One more than the largest sequence number of the checkpoints in a folder."""
    return max((_sequence(path) for path in existing(root)), default=-1) + 1


def candidates(root: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints in the order in which to try them, and what is wrong with the pointer.

    First the one that the pointer names, then the others, those saved last first.
    """
    found = sorted(existing(root), key=lambda path: (_sequence(path), _place(path)), reverse=True)
    pointer = root / LATEST
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return found, [f"{pointer} is missing"]
    except (OSError, ValueError) as error:
        return found, [f"{pointer} cannot be read: {error}"]
    if not name:
        return found, [f"{pointer} is empty"]
    named = [path for path in found if path.name == name]
    if not named:
        return found, [f"{pointer} names {name!r}, and there is no such checkpoint"]
    return named + [path for path in found if path.name != name], []


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _place(path: Path) -> tuple[int, int]:
    """A checkpoint's step, and the how-manieth of that step it is."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 1)


def _sequence(checkpoint: Path) -> int:
    """The how-manieth save into its folder a checkpoint is; -1 if its manifest is damaged."""
    try:
        return int(read_manifest(checkpoint)["sequence"])
    except (ValueError, KeyError, TypeError):
        return -1


def _checksum(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
