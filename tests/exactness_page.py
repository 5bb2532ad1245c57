"""Make docs/exactness.md from a run of the exactness suites.

    python -m tests.exactness_page                     # run the suites, then write the table
    python -m tests.exactness_page --record FILE       # write it from a file that APOLLO_TEST_RECORD named

The table has the worst relative error of every update rule, engine and number of ranks, with versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from .judge import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "exactness.md"
# What calls ``judge``.
SUITES = (
    "tests/exactness",
    "tests/rules",
    "tests/integrations/test_by_name.py",
    "tests/integrations/test_hugging_face_fsdp.py",
)
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate")
BEGIN, END = "<!-- table: python -m tests.exactness_page -->", "<!-- end of table -->"
RANKS = (1, 2, 3, 4)


def run(record: Path) -> None:
    """Run the suites; every judged error goes into ``record``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(suite for suite in SUITES if (ROOT / suite).exists())],
        cwd=ROOT,
        env={**os.environ, VARIABLE: str(record)},
    )
    if done.returncode:
        raise SystemExit(f"the suites failed with exit code {done.returncode}; the page is left as it is")


def table(entries: Iterable[dict[str, Any]], today: str) -> str:
    """Markdown: a line for each rule, engine and dtype, with the worst error at each number of ranks."""
    worst: dict[tuple[str, str, str], dict[int, float]] = {}
    bounds: dict[tuple[str, str, str], float] = {}
    count = 0
    for entry in entries:
        count += 1
        key = entry["rule"], entry["engine"], entry["dtype"]
        cell = worst.setdefault(key, {})
        cell[entry["ranks"]] = max(cell.get(entry["ranks"], 0.0), entry["error"])
        bounds[key] = max(bounds.get(key, 0.0), entry["tolerance"])
    if not worst:
        raise SystemExit("no error was recorded: the page is left as it is")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    lines = [
        f"{count} runs on {today}: {versions}, Python {platform.python_version()}, CPU with gloo.",
        "",
        "| rule | engine | weights | " + " | ".join(f"{n} rank{'s' if n > 1 else ''}" for n in RANKS) + " | bound |",
        "|---|---|---|" + "---|" * (len(RANKS) + 1),
    ]
    for key in sorted(worst):
        cells = [f"{worst[key][n]:.0e}" if n in worst[key] else "" for n in RANKS]
        lines.append("| " + " | ".join([*key, *cells, f"{bounds[key]:.0e}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="take the errors from this file instead of a run")
    record = parser.parse_args().record
    with tempfile.TemporaryDirectory() as folder:
        if record is None:
            record = Path(folder) / "errors.jsonl"
            run(record)
        entries = [json.loads(line) for line in record.read_text().splitlines()]
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END}, between which the table goes")
    made = table(entries, datetime.date.today().isoformat())
    PAGE.write_text(f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}")
    print(made)


if __name__ == "__main__":
    main()
