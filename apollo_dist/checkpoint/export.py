"""``python -m apollo_dist export PATH OUT``: a checkpoint's model as a plain Hugging Face folder."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub, int8
from .loading import Found, find
from .shards import Shards, read

_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Add the command to an argparse parser's ``subparsers``."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint's model as a Hugging Face folder",
        description="Write a checkpoint's model, configuration and tokenizer (where it has one) as a folder that "
        "transformers' from_pretrained reads. The weights are the optimizer's, in fp32 where it has fp32 masters.",
    )
    parser.add_argument("path", type=Path, help="a folder of checkpoints (the newest good one is taken), or one")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=_DTYPES, help="convert the weights to this dtype")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export and print; the exit code."""
    try:
        found = export(arguments.path, arguments.out, arguments.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}: the model of {found.path}, after step {found.step}")
    return 0


def export(path: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str | None = None) -> Found:
    """Write a checkpoint's model to ``out``, in one process; which checkpoint it was.

    Args:
        path: a folder of checkpoints, or one.
        out: the folder to write; it appears when it is complete.
        dtype: of the weights, such as "bfloat16"; None keeps theirs.

    Raises:
        ValueError: if there is no good checkpoint, its model is not one of transformers', or ``out`` is not empty.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder")
    found = find(path)
    source = found.path / hub.FOLDER
    if not (source / "config.json").is_file():
        raise ValueError(
            f"{found.path} holds no Hugging Face configuration: the model it was saved from is not one of "
            "transformers'. Load its tensors with torch.distributed.checkpoint; the keys are model.NAME"
        )
    model = _model(source, weights(found), getattr(torch, dtype) if dtype else None)
    draft = target.with_name(f".draft_{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    for file in source.iterdir():
        if not (draft / file.name).exists():  # the tokenizer's; the model has written its own
            shutil.copy(file, draft / file.name)
    if target.exists():
        target.rmdir()
    draft.rename(target)
    return found


def weights(found: Found) -> dict[str, Tensor]:
    """All parameters and buffers of a checkpoint, whole, by name, on the CPU; in one process."""
    described: Mapping[str, Any] = found.manifest["parameters"]
    whole = {
        name: torch.empty(about["shape"], dtype=getattr(torch, about["dtype"])) for name, about in described.items()
    }
    wanted = {f"model.{name}": tensor for name, tensor in whole.items() if tensor.numel()}
    stored = {}
    for name in [name for name, about in described.items() if about.get(int8.STORED) == int8.INT8]:
        empty = wanted.pop(f"model.{name}")
        stored[name] = torch.empty(empty.shape, dtype=torch.int8), torch.empty(len(empty), dtype=empty.dtype)
        wanted |= dict(zip(int8.keys_of(name), stored[name], strict=True))
    read(found.path, {key: Shards.whole(tensor) for key, tensor in wanted.items()})
    return whole | {name: int8.values_of(*pair, whole[name].dtype) for name, pair in stored.items()}


def _model(source: Path, state: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    """The transformers model with the weights ``state``."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no class {name}, which the checkpoint names")
    with torch.device("meta"):  # nothing is allocated or drawn
        model = cls(config)
    if dtype is not None:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [key for key, value in model.state_dict().items() if value.is_meta]
    if unexpected or missing:
        raise ValueError(
            f"the checkpoint does not fit {name}: it lacks {missing[:3]} and has {unexpected[:3]} too many"
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    return model
