"""Names of parameters and matrices: without wrappers, by index in a stack, abbreviated for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical_name(name: str) -> str:
    """The fully qualified name without the prefixes that wrappers add.

    ``module.`` (DDP, DeepSpeed) is stripped at the front, the others (torch.compile, FSDP1, activation checkpointing)
    wherever they stand, so a matrix has one name, and so one projection, under every engine.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def matrix_name(name: str, index: int, count: int) -> str:
    """The name of a parameter's ``index``-th matrix: the parameter's own, or ``name[index]`` for experts."""
    return name if count == 1 else f"{name}[{index}]"


def abbreviate(names: Iterable[str], limit: int = 12) -> str:
    """Names for the log, numbers as ``*``, counted: ``layers.*.mlp.up_proj.weight (24), ...``."""
    counts = Counter(map(pattern_of, names))
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f" and {len(counts) - limit} more kinds" if len(counts) > limit else "")


def pattern_of(name: str) -> str:
    """A name with its numbers as ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_unique(names: Iterable[str]) -> None:
    """Raise ValueError if two parameters share a canonical name: they would share a projection and a state."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"two parameters are named {name}; names must be unique after wrapper prefixes are stripped"
            )
        seen.add(name)
