"""How many cases and assertions the suite has, and which cases of an older checkout are missing.

    python -m tests.count [OLDER_CHECKOUT]

Cases are what pytest collects: functions, each with each of its parameters. Assertions are counted in the text of all
files of ``tests/``: assert statements, and each ``pytest.raises`` or ``pytest.warns``, which expect one.
An assertion in a loop or a helper counts once, however often it is executed. With an older checkout the counts of both
are printed, then each case that it has and this one has not; a file may have moved to another folder.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPECTING = {"raises", "warns", "deprecated_call"}


def cases(root: Path) -> set[str]:
    """The names of all cases of the checkout in ``root``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=root, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"pytest cannot collect {root}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = (line.partition("::") for line in done.stdout.splitlines() if "::" in line)
    return {f"{file.rpartition('/')[2]}::{case}" for file, _, case in found}


def assertions(root: Path) -> int:
    """The assert statements and expected errors in the text of all tests of the checkout in ``root``."""
    nodes = [node for path in sorted((root / "tests").rglob("*.py")) for node in ast.walk(ast.parse(path.read_text()))]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    expected = [call for call in calls if isinstance(call, ast.Attribute) and call.attr in EXPECTING]
    return sum(isinstance(node, ast.Assert) for node in nodes) + len(expected)


def main() -> None:
    """Print the counts."""
    now = cases(ROOT)
    print(f"this checkout: {len(now)} cases, {assertions(ROOT)} assertions")
    if len(sys.argv) > 1:
        older = Path(sys.argv[1]).resolve()
        then = cases(older)
        print(f"{older}: {len(then)} cases, {assertions(older)} assertions")
        print(f"{len(then - now)} of its cases are missing here", *sorted(then - now), sep="\n  ")


if __name__ == "__main__":
    main()
