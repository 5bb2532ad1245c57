"""``python -m apollo_dist lint FILE``: what is wrong with a DeepSpeed configuration, before it costs a run.

DeepSpeed ignores top-level keys that it does not know, clips gradients at 1.0 if it is not told otherwise, and fails
late, or trains something else, on "auto". Here every such thing is one line. Neither DeepSpeed nor ranks are needed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...optimizers.by_name import BY_NAME
from ...selection.choice import name_pattern
from ...sharding.deepspeed.faults import installed, not_yet
from ...sharding.deepspeed.unsupported import unsupported
from .keys import DEEPSPEED_AUTO, HUGGING_FACE_AUTO, LENIENT, MESH, OUTDATED, STRICT, TOP_LEVEL

Config = Mapping[str, Any]
# DeepSpeed lowers the names of its own optimizers, and looks up all others in torch.optim as they are.
DEEPSPEED_OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "muon", "musgd")
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check(
    config: Config, *, world: int | None = None, hugging_face: bool = False, deepspeed: str | None = None
) -> list[str]:
    """Everything that is wrong with a DeepSpeed configuration for training with APOLLO.

    Args:
        config: the configuration, as read from JSON.
        world: the number of ranks, for the arithmetic of batch sizes.
        hugging_face: whether the Hugging Face Trainer fills in "auto".
        deepspeed: the version that will run, such as "0.18.9"; None: the installed one, if there is one.

    Returns:
        One line for each finding, ``key: what is wrong; what to write``; empty if there is nothing to say.
    """
    filled = _without_auto(config)
    return [
        *unknown_keys(config),
        *outdated_keys(config),
        *auto_values(config, hugging_face),
        *missing_keys(config, hugging_face),
        *batch_sizes(filled, world),
        *optimizer(filled),
        *offload(filled),
        *unsupported(with_accumulation(filled, world), deepspeed),
        *not_yet(config, deepspeed or installed()),
    ]


def unknown_keys(config: Config) -> Iterator[str]:
    """Typing errors: at the top and in some sections DeepSpeed ignores them, in others it fails on them."""
    silently = "DeepSpeed ignores this key without a word"
    yield from _unknown(config, "", TOP_LEVEL | MESH, silently)
    for sections, consequence in ((LENIENT, silently), (STRICT, "DeepSpeed refuses this key")):
        for name, known in sections.items():
            yield from _unknown(_section(config, name), name + ".", known, consequence)


def _unknown(section: Config, prefix: str, known: Collection[str], consequence: str) -> Iterator[str]:
    for key in section:
        # A leading underscore is how people write comments into JSON.
        if key not in known and prefix + key not in OUTDATED and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, n=1)
            yield f"{prefix}{key}: {consequence}" + (f"; did you mean {near[0]}?" if near else "; remove it")


def outdated_keys(config: Config) -> Iterator[str]:
    """Keys of older versions."""
    for name, instead in OUTDATED.items():
        section, _, key = name.rpartition(".")
        if key in (_section(config, section) if section else config):
            yield f"{name}: outdated; write {instead}"
    if isinstance(config.get("zero_optimization"), bool):
        yield 'zero_optimization: outdated form; write {"stage": ...}'


def auto_values(config: Config, hugging_face: bool) -> Iterator[str]:
    """Values "auto" that nobody replaces."""
    for name in _autos(config, ""):
        if name in DEEPSPEED_AUTO:
            continue
        if not hugging_face:
            yield (
                f'{name}: "auto" is for the Hugging Face Trainer or apollo_dist.pretrain to fill in; plain DeepSpeed '
                "fails on it, or takes its default without a word. Write a value (lint --hf if the file is for them)"
            )
        elif name not in HUGGING_FACE_AUTO:
            yield f'{name}: the Hugging Face Trainer does not fill in "auto" here; write a value'


def missing_keys(config: Config, hugging_face: bool) -> Iterator[str]:
    """Keys whose absence changes the run."""
    if "gradient_clipping" not in config:
        yield (
            "gradient_clipping: missing, and DeepSpeed then clips at 1.0; write 0.0 (APOLLO's norm-growth limiter "
            "takes that part) or the limit that you want"
        )
    if not any(key in config for key in BATCH[:2]):
        yield f"{BATCH[1]}: missing; write it or {BATCH[0]}"
    zero = _section(config, "zero_optimization")
    if "stage" not in zero and not isinstance(config.get("zero_optimization"), bool):
        yield "zero_optimization.stage: missing, and DeepSpeed then shards nothing; write 0 if that is meant"
    if hugging_face and zero.get("stage") == 3 and "stage3_gather_16bit_weights_on_model_save" not in zero:
        yield (
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: missing, and the Trainer then saves no "
            "weights that from_pretrained reads; write true"
        )
    if "optimizer" in config and "type" not in _section(config, "optimizer"):
        yield 'optimizer.type: missing, and DeepSpeed then ignores the section; write "APOLLO" or "APOLLOMini"'


def batch_sizes(config: Config, world: int | None) -> Iterator[str]:
    """train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks."""
    sizes: dict[str, int] = {}
    for key in BATCH:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"{key}: must be an integer >= 1, got {value!r}"
            return
        sizes[key] = value
    total = sizes.pop("train_batch_size", None)
    if total is not None:
        factors = list(sizes.values()) + ([world] if world else [])
        product = 1
        for factor in factors:
            product *= factor
        complete = len(sizes) == 2 and world is not None
        if total % product or (complete and total != product):
            terms = [f"{value} ({key})" for key, value in sizes.items()] + ([f"{world} ranks"] if world else [])
            need = "is not" if complete else "is not a multiple of"
            yield f"train_batch_size: {total} {need} {' * '.join(terms)} = {product}"
    hpz = _section(config, "zero_optimization").get("zero_hpz_partition_size", 1)
    if world is not None and isinstance(hpz, int) and hpz > 1 and world % hpz:
        yield f"zero_optimization.zero_hpz_partition_size: {hpz} does not divide {world} ranks"


def with_accumulation(config: Config, world: int | None) -> Config:
    """The configuration with ``gradient_accumulation_steps``, where that follows from the other sizes and ``world``."""
    total, micro, steps = (config.get(key) for key in BATCH)
    if world and steps is None and isinstance(total, int) and isinstance(micro, int) and micro > 0:
        return {**config, BATCH[2]: max(1, total // (micro * world))}
    return config


def optimizer(config: Config) -> Iterator[str]:
    """The optimizer's name, and for ours its parameters, which are those of ``apollo_dist.APOLLO``."""
    section = _section(config, "optimizer")
    kind, params = section.get("type"), dict(_section(section, "params"))
    if kind is None:
        return
    kind = str(kind)
    if "max_grad_norm" in params:
        del params["max_grad_norm"]
        yield "optimizer.params.max_grad_norm: DeepSpeed refuses it; write gradient_clipping at the top level"
    if kind in BY_NAME:
        try:
            # One matrix, large enough for any rank and without memory, validates as in a run.
            name_pattern(params.pop("exclude", None))
            BY_NAME[kind]([("layers.0.weight", nn.Parameter(torch.empty((1 << 24, 1 << 24), device="meta")))], **params)
        except (TypeError, ValueError) as error:
            yield f"optimizer.params: {error}"
    elif kind.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, kind):
        nearest = {name.lower(): name for name in BY_NAME}
        near = difflib.get_close_matches(kind.lower().replace("-", "").replace("_", ""), nearest, n=1)
        yield f"optimizer.type: unknown, {kind!r}" + (f"; did you mean {nearest[near[0]]!r}?" if near else "")
    else:
        ours = {cls.__name__.lower(): name for name, cls in BY_NAME.items()}.get(kind.lower())
        write = 'Write "APOLLO" or "APOLLOMini"' if ours is None else f'This library\'s is "{ours}". Write that'
        yield (
            f"optimizer.type: {kind!r} is another optimizer, and DeepSpeed trains with it: it outranks the Trainer's "
            f'optim="apollo_adamw", and an optimizer from the code is the only one that outranks it. {write}, or '
            "remove the section and build the optimizer in the code"
        )


def offload(config: Config) -> Iterator[str]:
    """Offload that is refused, or under which Accelerate would replace the optimizer."""
    zero = _section(config, "zero_optimization")
    device = _section(zero, "offload_optimizer").get("device", "none")
    named = _section(config, "optimizer").get("type")
    if device != "none" and named is None and config.get("zero_force_ds_cpu_optimizer", True):
        yield (
            "zero_force_ds_cpu_optimizer: must be false with offload_optimizer; else DeepSpeed refuses an optimizer "
            "that is passed to it, and Accelerate puts DeepSpeedCPUAdam in its place"
        )
    if _section(zero, "offload_param").get("device", "none") != "none" and zero.get("stage") != 3:
        yield "zero_optimization.offload_param: works at stage 3 only; DeepSpeed ignores it without a word"
    for name in ("offload_optimizer", "offload_param"):
        part = _section(zero, name)
        if part.get("device") == "nvme" and not part.get("nvme_path"):
            yield f'zero_optimization.{name}.nvme_path: missing with "device": "nvme"'


def _section(config: Config, name: str) -> Config:
    """A section by dotted name; empty where there is none, or something else."""
    for part in name.split("."):
        found = config.get(part)
        config = found if isinstance(found, Mapping) else {}
    return config


def _autos(value: Any, name: str) -> Iterator[str]:
    """Dotted names of all values "auto"."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, f"{name}.{key}" if name else str(key))
    elif value == "auto":
        yield name


def _without_auto(config: Config) -> dict[str, Any]:
    """A copy without the keys that hold "auto", as if their values were not known yet."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not (isinstance(value, str) and value == "auto")
    }


def load(path: Path) -> dict[str, Any]:
    """A configuration from a file.

    Raises:
        OSError, ValueError: if it cannot be read, is no JSON object, or says a key twice.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key!r} appears twice")
            result[key] = value
        return result

    config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    if not isinstance(config, dict):
        raise ValueError("a JSON object is expected")
    return config


def add_parser(subparsers: Any) -> None:
    """Add ``lint`` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "lint",
        help="check DeepSpeed configurations",
        description="Checks DeepSpeed configurations. Prints one line for each finding. Exit code: 0 if there is "
        "none, 1 if there are some, 2 if a file cannot be read.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="DeepSpeed's JSON")
    parser.add_argument(
        "--world", type=_positive, metavar="N", help="number of data-parallel ranks, to check the batch sizes with"
    )
    parser.add_argument("--hf", action="store_true", help='for the Hugging Face Trainer, which fills in "auto"')
    parser.add_argument(
        "--deepspeed", metavar="VERSION", help="the DeepSpeed that will run, for its known faults (default: installed)"
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    code = 0
    for path in arguments.files:
        try:
            config = load(path)
        except (OSError, ValueError) as error:
            print(f"{path}: cannot be read: {error}", file=sys.stderr)
            code = 2
            continue
        findings = check(config, world=arguments.world, hugging_face=arguments.hf, deepspeed=arguments.deepspeed)
        for finding in findings:
            print(f"{path}: {finding}")
        if not findings:
            print(f"{path}: ok")
        elif code == 0:
            code = 1
    return code
