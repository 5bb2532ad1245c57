"""``python -m apollo_dist verify PATH``: check every file of a checkpoint, or of all in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import folder


def add_parser(subparsers: Any) -> None:
    """Add the command to an argparse parser's ``subparsers``."""
    parser = subparsers.add_parser(
        "verify",
        help="compare every file of a checkpoint with its manifest",
        description="Compare every file of a checkpoint, or of all in a folder, with the manifest's SHA-256. "
        "Prints one line for each checkpoint and each bad file; the exit code is 1 if there is any.",
    )
    parser.add_argument("path", type=Path, help="a folder of checkpoints, or one checkpoint (step_XXXXXXXX)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and print; the exit code."""
    root: Path = arguments.path
    bad = False
    if folder.is_checkpoint(root):
        checkpoints = [root]
    else:
        checkpoints, problems = folder.candidates(root)
        if not checkpoints:
            problems = [f"there is no checkpoint in {root}"]
        for problem in problems:
            print(f"bad   {problem}")
            bad = True
    for checkpoint in checkpoints:
        problems = list(problems_of(checkpoint))
        for problem in problems:
            print(f"bad   {problem}")
            bad = True
        if not problems:
            files = folder.read_manifest(checkpoint)["files"]
            print(f"good  {checkpoint}: {len(files)} files, {sum(f['bytes'] for f in files.values()):,} bytes")
    return int(bad)


def problems_of(checkpoint: Path) -> Iterator[str]:
    """What is wrong with a checkpoint: one line for each bad file."""
    try:
        manifest = folder.read_manifest(checkpoint)
    except ValueError as error:
        yield str(error)
    else:
        yield from folder.check_files(checkpoint, manifest["files"])
