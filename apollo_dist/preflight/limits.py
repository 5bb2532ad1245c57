"""What a preflight requires."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

UNITS = {"": 1e9, "GB": 1e9, "G": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20, "TB": 1e12, "TIB": 2**40}


@dataclass(frozen=True)
class Limits:
    """Expectations of the user; None: no expectation."""

    nodes: int | None = None
    ranks_per_node: int | None = None
    gpu_memory: int | None = None  # bytes of each GPU
    bandwidth: float | None = None  # GB/s on the bus, of an all_reduce over all ranks
    free_disk: int | None = None  # bytes; None: from the model's size
    clock_skew: float = 5.0  # seconds


def gigabytes(text: str) -> int:
    """``80GB``, ``40GiB``, ``1.5TB`` or a number of GB, as bytes."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: write 80GB, 40GiB or a number of GB")
    return int(float(found[1]) * UNITS[found[2].upper()])
