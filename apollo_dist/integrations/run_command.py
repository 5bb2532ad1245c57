"""``python -m apollo_dist run``: a training program as it is, after ``import apollo_dist``.

For programs whose code is not to be changed, such as LLaMA-Factory and Axolotl: importing this package is what makes
DeepSpeed and the Hugging Face ``Trainer`` know its optimizers by name.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from typing import Any

from .trainer_optim import replace_apollo_torch


def add_parser(subparsers: Any) -> None:
    """Add the command to ``python -m apollo_dist``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a training program that does not import apollo_dist itself",
        description="Runs a script, or with -m a module, as Python would, after importing apollo_dist. Launchers start "
        "it like any module: torchrun ... -m apollo_dist run train.py ARGUMENTS",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--replace-apollo-torch",
        action="store_true",
        help='let optim="apollo_adamw" mean apollo_dist where apollo-torch is installed too',
    )
    parser.add_argument("-m", dest="module", action="store_true", help="TARGET is the name of a module")
    parser.add_argument("target", metavar="TARGET", help="the script, or the module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="of the program")
    parser.set_defaults(run=_run, takes_more=True)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.replace_apollo_torch:
        replace_apollo_torch()
    # What stands in front of the command is from a launcher (--local_rank of DeepSpeed's), and meant for the program.
    sys.argv = [arguments.target, *arguments.more, *arguments.arguments]
    if arguments.module:
        runpy.run_module(arguments.target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments.target)))
        runpy.run_path(arguments.target, run_name="__main__")
    return 0
