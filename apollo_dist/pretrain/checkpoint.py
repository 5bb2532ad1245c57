"""Checkpoints that are complete or absent, and resumption that continues exactly or fails.

::

    OUTPUT/checkpoints/latest                 the name of the newest checkpoint
    OUTPUT/checkpoints/step_00000100/
        manifest.json                         what it is, and every file with its size and SHA-256
        trainer_rank_00000.pt                 per rank: data position and random state
        ...                                   what the engine writes

It is written into a hidden folder, made durable, and renamed; then ``latest`` is replaced. A process that dies on the
way leaves the checkpoint before it as the newest. The folder must be on storage that all ranks share.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apollo_dist.pretrain.data.packed import TrainData
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.engines.base import Engine

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run. ``facts`` is what a resumed run must share: configuration, data, batch plan."""

    def __init__(self, output: Path, keep: int, facts: Mapping[str, object], ranks: Ranks) -> None:
        self._folder = output / "checkpoints"
        self._keep = keep
        self._facts = json.loads(json.dumps(facts))  # as they read back
        self._ranks = ranks

    def require_none(self) -> None:
        """Raise SetupError if there are any: a new run must not mix with an old one's; collective."""

        def check() -> None:
            found = self._existing()
            if found:
                raise ValueError(
                    f"{self._folder} has checkpoints up to {found[-1].name}: "
                    "pass --resume to continue that run, or another --output"
                )

        self._ranks.together(check)

    def save(self, step: int, engine: Engine, data: TrainData) -> Path:
        """Write the state after ``step``; the path of the finished checkpoint. Collective."""
        name = f"step_{step:08d}"
        draft = self._folder / f".draft_{name}"

        def prepare() -> None:
            if self._ranks.first:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)

        self._ranks.together(prepare)
        engine.save(draft)
        state = {"step": step, "data": data.state_dict(), "random": _random_state(self._ranks.device)}
        self._ranks.together(lambda: torch.save(state, draft / self._trainer_file()))
        paths = self._ranks.together(lambda: sorted(p for p in draft.rglob("*") if p.is_file()))
        parts = self._ranks.gather(self._ranks.together(lambda: self._describe(paths, draft)))
        files = {path: entry for part in parts for path, entry in part.items()}

        def commit() -> None:
            if self._ranks.first:
                manifest = {"format": FORMAT, "step": step, "facts": self._facts, "files": files}
                _write_durably(draft / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
                for folder in {path.parent for path in paths}:
                    _sync(folder)
                self._publish(draft, self._folder / name)

        self._ranks.together(commit)
        return self._folder / name

    def find(self) -> Path:
        """The newest checkpoint, every byte of it checked; collective.

        Raises SetupError on all ranks, naming the file, where there is none, it belongs to another run or number of
        ranks, or any of its files is missing or not as it was written.
        """
        checkpoint = self._ranks.together(self._newest)
        manifest = self._ranks.together(lambda: self._read_manifest(checkpoint))
        self._ranks.together(lambda: self._verify(checkpoint, manifest["files"]))
        return checkpoint

    def load(self, checkpoint: Path, engine: Engine, data: TrainData) -> int:
        """Continue from a checkpoint that `find` found; returns its step. Collective."""
        engine.load(checkpoint)

        def restore() -> int:
            state = torch.load(checkpoint / self._trainer_file(), map_location="cpu", weights_only=True)
            data.load_state_dict(state["data"])
            _set_random_state(state["random"], self._ranks.device)
            return int(state["step"])

        return self._ranks.together(restore)

    def _existing(self) -> list[Path]:
        return sorted(self._folder.glob("step_*"))

    def _trainer_file(self) -> str:
        return f"trainer_rank_{self._ranks.rank:05d}.pt"

    def _share(self, paths: list[Any]) -> list[Any]:
        """This rank's share of reading and hashing."""
        return paths[self._ranks.rank :: self._ranks.world]

    def _describe(self, paths: list[Path], root: Path) -> dict[str, dict[str, object]]:
        entries: dict[str, dict[str, object]] = {}
        for path in self._share(paths):
            _sync(path)
            entries[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        return entries

    def _publish(self, draft: Path, final: Path) -> None:
        """Rename the draft, point ``latest`` at it, and delete old checkpoints: in this order, each step durable."""
        stale = final.with_name(f".stale_{final.name}")
        shutil.rmtree(stale, ignore_errors=True)
        if final.exists():  # left by a run that died before `latest` said so; this one supersedes it
            final.rename(stale)
        draft.rename(final)
        _sync(self._folder)
        pointer = self._folder / f".{LATEST}"
        _write_durably(pointer, final.name + "\n")
        os.replace(pointer, self._folder / LATEST)
        _sync(self._folder)
        shutil.rmtree(stale, ignore_errors=True)
        older = [path for path in self._existing() if path.name < final.name]
        for path in older[: max(0, len(older) + 1 - self._keep)]:
            shutil.rmtree(path)

    def _newest(self) -> Path:
        pointer = self._folder / LATEST
        if not pointer.is_file():
            raise ValueError(f"--resume: there is no checkpoint to resume from: {pointer} does not exist")
        checkpoint = self._folder / pointer.read_text(encoding="utf-8").strip()
        if checkpoint.parent != self._folder or not checkpoint.name.startswith("step_") or not checkpoint.is_dir():
            raise ValueError(f"--resume: {pointer} names {checkpoint.name!r}, and there is no such checkpoint")
        return checkpoint

    def _read_manifest(self, checkpoint: Path) -> dict[str, Any]:
        path = checkpoint / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            saved, files, layout = manifest["facts"], manifest["files"], manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint file {path} is missing or damaged: {error}") from error
        if layout != FORMAT or not isinstance(files, dict):
            raise ValueError(f"{path} has checkpoint format {layout}; this version reads {FORMAT}")
        differing = [key for key in {**saved, **self._facts} if saved.get(key) != self._facts.get(key)]
        if differing:
            shown = "; ".join(f"{key} was {saved.get(key)!r} and is {self._facts.get(key)!r}" for key in differing)
            raise ValueError(f"checkpoint {checkpoint} belongs to another run: {shown}. Resume with the same values")
        return dict(manifest)

    def _verify(self, checkpoint: Path, files: Mapping[str, Mapping[str, object]]) -> None:
        for name in self._share(sorted(files)):
            path = checkpoint / name
            if not path.is_file():
                raise ValueError(f"checkpoint file {path} is missing")
            size, wanted = path.stat().st_size, files[name]
            if size != wanted["bytes"]:
                raise ValueError(f"checkpoint file {path} has {size} bytes, not {wanted['bytes']}: it is truncated")
            if _sha256(path) != wanted["sha256"]:
                raise ValueError(f"checkpoint file {path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
