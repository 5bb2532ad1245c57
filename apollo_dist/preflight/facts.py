"""What each rank finds out by itself: versions, GPU, recipe, storage."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apollo_dist.pretrain.resolve import resolve
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.versions import node, versions

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config, ModelConfig

WRITTEN = 1 << 20  # bytes of the write test, each rank
BYTES_PER_PARAMETER = 12  # in a checkpoint: fp32 weights, and at most AdamW's two moments


@dataclass(frozen=True)
class Facts:
    """One rank's; everything is plain JSON."""

    rank: int
    node: str
    versions: dict[str, str]
    gpus: int = 0  # that this rank sees
    gpu: str = ""  # the name of its own; empty: it has none
    gpu_memory: int = 0  # bytes
    gpu_free: int = 0  # bytes
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # the run's, by key
    options_problem: str = ""
    folder: str = ""  # where checkpoints go
    folder_problem: str = ""
    free_disk: int = 0  # bytes
    needed_disk: int = 0  # bytes, for the checkpoints that are kept and one more
    problem: str = ""  # the error that kept this rank from finding out the rest


def find_out(rank: int, world: int, arguments: Sequence[str], token: str) -> Facts:
    """This rank's facts; local. Leaves a file of the write test named after ``token``."""
    facts = _with_gpu(Facts(rank, node(), versions()))
    try:
        settings = load_settings(arguments)
        resolve(settings, world)
        config, options = settings.config, _flat(settings.config)
    except (ValueError, OSError) as error:
        return dataclasses.replace(facts, options_problem=str(error))
    folder = config.output_folder / "checkpoints"
    found = dataclasses.replace(
        facts,
        options=options,
        folder=str(folder.absolute()),
        needed_disk=BYTES_PER_PARAMETER * parameters(config.model) * (config.keep_checkpoints + 1),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = written(folder, token, rank)
        try:
            with path.open("wb") as file:
                file.write(os.urandom(WRITTEN))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return dataclasses.replace(found, free_disk=shutil.disk_usage(folder).free)
    except OSError as error:
        return dataclasses.replace(found, folder_problem=str(error))


def written(folder: Path, token: str, rank: int) -> Path:
    """The file of a rank's write test."""
    return folder / f".preflight-{token}-{rank}"


def parameters(model: ModelConfig) -> int:
    """How many parameters a LLaMA of this shape has."""
    h, i = model.hidden_size, model.intermediate_size
    return 2 * model.vocab_size * h + model.num_layers * (4 * h * h + 3 * h * i + 2 * h) + h


def _with_gpu(facts: Facts) -> Facts:
    if not torch.cuda.is_available():
        return facts
    count, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if own >= count:
        return dataclasses.replace(facts, gpus=count)
    free, total = torch.cuda.mem_get_info(own)
    return dataclasses.replace(facts, gpus=count, gpu=torch.cuda.get_device_name(own), gpu_memory=total, gpu_free=free)


def _flat(config: Config) -> dict[str, str]:
    """All options by key, DeepSpeed's JSON included."""
    flat: dict[str, str] = {}
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": repr(v) for inner, v in value.items()}
        else:
            flat[key] = repr(value)
    flat["optimizer.name"] = repr(config.optimizer.name)
    if config.deepspeed_config is not None:
        flat["DeepSpeed's JSON"] = repr(Path(config.deepspeed_config).read_text(encoding="utf-8"))
    return flat
