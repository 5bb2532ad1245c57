"""``preflight``: what would stop a training run on this cluster, found in under a minute, before it starts.

Started as the training will be (torchrun, deepspeed, srun), with its options. See ``checks`` for what is looked at.
"""

from __future__ import annotations

import argparse
from typing import Any

from .limits import gigabytes

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Add the command to ``python -m apollo_dist``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "preflight",
        help="check ranks, GPUs, versions, recipe, storage, clocks and network before training",
        description=f"{__doc__} Other options are those of apollo_dist.pretrain: --recipe, --output, and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, help="how many machines there must be")
    parser.add_argument("--ranks_per_node", type=int, help="how many ranks each must have")
    parser.add_argument("--min_gpu_memory", type=gigabytes, help="of each GPU: 80GB, 40GiB; a number alone is in GB")
    parser.add_argument("--min_bandwidth", type=float, help="of an all_reduce over all ranks, bus bandwidth in GB/s")
    parser.add_argument(
        "--min_free_disk", type=gigabytes, help="where checkpoints go; default: room for them, at 12 bytes a parameter"
    )
    parser.add_argument("--max_clock_skew", type=float, default=5.0, help="seconds between clocks (default 5)")
    parser.add_argument("--timeout", type=float, default=50.0, help="seconds for all of it (default 50)")
    parser.set_defaults(run=_run, takes_more=True)


def _run(arguments: argparse.Namespace) -> int:
    from .limits import Limits
    from .runner import preflight

    limits = Limits(
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        gpu_memory=arguments.min_gpu_memory,
        bandwidth=arguments.min_bandwidth,
        free_disk=arguments.min_free_disk,
        clock_skew=arguments.max_clock_skew,
    )
    return preflight(limits, arguments.more, arguments.timeout)
