"""``python -m apollo_dist choose MODEL``: which parameters of a model would be low-rank, without its weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .choice import EMBEDDINGS, Chosen, check_any, of_model
from .describe import table

# Tried in this order where the configuration names no class.
_AUTO_CLASSES = (
    "AutoModelForPreTraining", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM", "AutoModelForImageClassification", "AutoModel",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Add ``choose`` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "choose",
        help="which matrices of a model are low-rank, and why",
        description="Builds a transformers model without its weights and prints a table: parameter, shape, low-rank or "
        "AdamW, why. Exit code: 0 if any matrix is low-rank, 1 if none is, 2 if the model cannot be built.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL_NAME_OR_CONFIG",
        help="a config.json, a folder with one, a model type such as llama (with its default sizes), or a name on the "
        "Hugging Face hub",
    )
    parser.add_argument("--rank", type=int, default=256, help="of APOLLO's projections (default 256)")
    parser.add_argument("--exclude", help="regular expression of names to leave to AdamW")
    parser.add_argument(
        "--embeddings", choices=EMBEDDINGS, default="adamw", help="whether embeddings and heads are low-rank as well"
    )
    parser.add_argument("--model-class", help="such as BertForSequenceClassification (default: what the config names)")
    parser.add_argument("--every", action="store_true", help="a line for each parameter, not for each kind")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    try:
        if arguments.rank < 1:
            raise ValueError(f"--rank must be at least 1, got {arguments.rank}")
        model = meta_model(arguments.model, arguments.model_class)
        choice: dict[str, Chosen] = of_model(model, arguments.rank, arguments.exclude, arguments.embeddings)
    except ValueError as error:
        print(f"choose: {error}", file=sys.stderr)
        return 2
    print(table(choice.values(), every=arguments.every))
    try:
        check_any(choice, type(model).__name__, arguments.rank)
    except ValueError as error:
        print(f"choose: {error}", file=sys.stderr)
        return 1
    return 0


def meta_model(source: str, model_class: str | None = None) -> nn.Module:
    """A transformers model on the meta device: names and shapes, no memory.

    Args:
        source: a path of a configuration, a model type, or a name on the hub.
        model_class: a class of transformers; None: the first of the configuration's ``architectures``, or what
            transformers pre-trains.

    Raises:
        ValueError: if transformers is not installed, or the model cannot be built, with its reason.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"a model by name needs {error.name}: pip install transformers") from error
    config = _config(transformers, source)
    names = [model_class] if model_class else list((config.architectures or [])[:1])
    reason: Exception | None = None
    for name in (*names, *(_AUTO_CLASSES if not model_class else ())):
        kind = getattr(transformers, name, None)
        if kind is None:
            reason = ValueError(f"transformers {transformers.__version__} has no class {name}")
            continue
        build = kind.from_config if name.startswith("Auto") else kind
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                built: nn.Module = build(config)
            return built
        except Exception as error:
            reason = error
    raise ValueError(f"cannot build {source}: {type(reason).__name__}: {reason}")


def _config(transformers: Any, source: str) -> Any:
    path = Path(source)
    try:
        if not path.exists() and source in transformers.CONFIG_MAPPING:
            return transformers.CONFIG_MAPPING[source]()
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source} is no path of a configuration, no model type of transformers {transformers.__version__}, and no "
            f"model that it can load: {first}"
        ) from error
