"""``python -m apollo_dist COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import preflight, reporting
from .checkpoint import export, verify
from .integrations import run_command
from .integrations.deepspeed_config import lint
from .integrations.extras import after_failed_import
from .planning import command as plan
from .selection import command as choose

# Modules with ``add_parser(subparsers)``; their parsers' default ``run`` takes the arguments and returns the exit code.
# With the default ``takes_more``, arguments that the parser does not know reach it as ``more``.
COMMANDS = (lint, verify, export, plan, choose, preflight, reporting, run_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m apollo_dist", description=__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(subparsers)
    parsed, more = parser.parse_known_args(arguments)
    if more and not getattr(parsed, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    parsed.more = more
    try:
        code: int = parsed.run(parsed)
    except ImportError as error:
        advice = after_failed_import(error)
        if advice is None:
            raise
        print(f"error: {advice}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
