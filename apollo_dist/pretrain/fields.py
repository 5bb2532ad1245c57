"""Fields of configurations: their help texts, and the checks that name the key and the value."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError unless something holds; ``rule`` says what it is."""
    if not holds:
        raise ValueError(f"{key} is {value!r}: it must be {rule}")


def at_least(low: float, **values: float | None) -> None:
    """Raise ValueError for a value below ``low``; None is good."""
    for key, value in values.items():
        require(value is None or value >= low, key, value, f"at least {low}")


def one_of(choices: tuple[str, ...], key: str, value: str) -> None:
    """Raise ValueError unless a value is one of some."""
    require(value in choices, key, value, "one of " + ", ".join(choices))
