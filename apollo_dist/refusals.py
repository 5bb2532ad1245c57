"""DeepSpeed configurations under which no optimizer that communicates can be exact, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Why ``config``, a DeepSpeed configuration as a dictionary, is refused; empty if it is not."""
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    autocast = config.get("torch_autocast")
    found = []
    if zero.get("elastic_checkpoint"):
        found.append("zero_optimization.elastic_checkpoint: it assumes Adam's states; remove it")
    if zero.get("zenflow"):
        found.append("zero_optimization.zenflow: it brings its own optimizer; remove it")
    if isinstance(autocast, Mapping) and autocast.get("enabled") and zero.get("compute_grad_norm") is False:
        found.append(
            "zero_optimization.compute_grad_norm: with torch_autocast in fp16 one rank may step while another skips, "
            "which ends in a deadlock; remove it"
        )
    return found
