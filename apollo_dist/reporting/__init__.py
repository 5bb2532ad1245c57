"""``python -m apollo_dist env``: what a report of a fault needs to say about where it was seen.

One command, whose output can be pasted: versions, devices and the variables that change how torch, NCCL, gloo,
DeepSpeed and Accelerate behave; with ``--model`` the choice of matrices, with ``--deepspeed_config`` the engine.
"""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Add the command to ``python -m apollo_dist``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "env",
        help="versions, devices, engine and choice of matrices, to paste into a report",
        description="Prints what a report of a fault needs. Exit code: 0, or 2 if model or file cannot be read.",
    )
    parser.add_argument(
        "--model", help="a config.json, a folder with one, a model type or a name on the hub: which matrices are chosen"
    )
    parser.add_argument("--rank", type=int, default=256, help="of the projections, for --model (default 256)")
    parser.add_argument("--deepspeed_config", help="a DeepSpeed JSON: its engine and layout, and what lint says of it")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from .environment import report

    return report(arguments.model, arguments.rank, arguments.deepspeed_config)
