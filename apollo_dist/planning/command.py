"""``python -m apollo_dist plan RECIPE``: whether a run fits, and what it sends, before it starts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ..pretrain.optimizer_config import ApolloConfig
from ..pretrain.settings import load_settings
from .memory import forecast
from .options import ATTENTIONS, CHECKPOINTING, ENGINES, LOSSES, OFFLOADS, PRECISIONS, Options, parse_bytes
from .plot import draw
from .report import as_json, table


def add_parser(subparsers: Any) -> None:
    """Add ``plan`` to the command line."""
    defaults = Options()
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="memory and traffic of a run, before it starts",
        description="Prints what the worst rank of a run holds under APOLLO, GaLore, Fira, Muon and others, "
        "the largest micro-batch that fits, and what a step sends. No device and no other rank is needed. Exit code: 0 "
        "if the recipe's optimizer fits, 1 if not, 2 if the arguments make no sense.",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="as for apollo_dist.pretrain: a name such as 13B, or a YAML file")
    add("--world", type=int, default=8, help="ranks (default 8)")
    add("--gpus-per-node", type=int, default=8, help="ranks on one machine (default 8)")
    add("--engine", default="zero3", help=", ".join(ENGINES) + " (default zero3)")
    add("--shard-size", type=int, help="hsdp: ranks that divide the model (default: those of one node)")
    add("--gpu-memory", default="80GB", metavar="SIZE", help="of one device, such as 80GB or 40GiB (default 80GB)")
    add("--reserve", default="2GB", metavar="SIZE", help="set aside for what is not counted (default 2GB)")
    add("--micro-batch", type=int, help="sequences of a forward pass (default: the recipe's, or 1)")
    add("--sequence-length", type=int, help="tokens of a sequence (default: the recipe's)")
    add("--rank", type=int, help="of APOLLO's projections (default: the recipe's)")
    add("--scale-type", help="of APOLLO: channel or tensor (default: the recipe's)")
    add("--adam-dtype", help="of AdamW's moments: float32 or bfloat16 (default: the recipe's, or float32)")
    add("--precision", help=", ".join(PRECISIONS) + " (default: the recipe's); docs/planning.md says what they mean")
    add("--weights", help="int8: the linear layers of the blocks in INT8 (default: the recipe's)")
    add("--gradient-dtype", help="fp32 or bf16, of the gradients that ZeRO keeps (default: the weights')")
    add("--attention", help=", ".join(ATTENTIONS) + " (default: the recipe's)")
    add(
        "--checkpointing",
        nargs="?",
        const="full",
        metavar="KIND",
        help="recompute decoder layers in the backward pass: " + ", ".join(CHECKPOINTING) + " (default: the recipe's; "
        "full if no kind is given)",
    )
    add("--loss", help=", ".join(LOSSES) + " (default: the recipe's)")
    add("--loss-chunk", type=int, help="tokens of a chunk (default: the recipe's)")
    add("--offload", default=defaults.offload, help=", ".join(OFFLOADS) + f" (default {defaults.offload})")
    add("--layerwise", action="store_true", help="update inside the backward pass, so that one gradient is kept")
    add(
        "--bucket-view",
        action=argparse.BooleanOptionalAction,
        help="DDP with gradient_as_bucket_view, as the trainer has it, or without, as torch has it by default",
    )
    add("--json", type=Path, metavar="FILE", help="write everything, rank by rank")
    add("--png", type=Path, metavar="FILE", help="draw stacked bars (needs matplotlib)")
    parser.set_defaults(run=run)


def options_of(arguments: argparse.Namespace) -> tuple[str, Any, Options]:
    """(name, model, options) that the arguments and their recipe ask for; ValueError if they make no sense."""
    config = load_settings(["--recipe", arguments.recipe, "--optimizer", "apollo"]).config
    assert isinstance(config.optimizer, ApolloConfig)
    found: dict[str, Any] = {
        "micro_batch": config.micro_batch_size or 1,
        "sequence_length": config.sequence_length,
        "rank": config.optimizer.rank,
        "scale_type": config.optimizer.scale_type,
        "adam_dtype": config.optimizer.adam_dtype,
        "precision": config.precision,
        "weights": config.weights,
        "attention": config.attention,
        "checkpointing": config.activation_checkpointing,
        "loss": config.loss,
        "loss_chunk": config.loss_chunk,
    }
    known = {field.name for field in dataclasses.fields(Options)}
    found |= {key: value for key, value in vars(arguments).items() if key in known and value is not None}
    found |= {key: parse_bytes(getattr(arguments, key)) for key in ("gpu_memory", "reserve")}
    return Path(arguments.recipe).stem, config.model, Options(**found)


def run(arguments: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    try:
        name, model, options = options_of(arguments)
        found = forecast(name, model, options)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")
    if arguments.png:
        if draw(found, arguments.png):
            print(f"wrote {arguments.png}")
        else:
            print("matplotlib is not installed, so there is no picture: pip install 'apollo-dist[plot]'")
    return 0 if found.fits("apollo") else 1
