"""What is asked about when low-rank matrices are chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """What is asked about.

    Attributes:
        key: the ``id`` of the parameter.
        name, shape: canonical name and logical shape.
        named: whether the name is its own, not its place in a list.
        frozen: whether it does not require gradients at present.
    """

    key: int
    name: str
    shape: tuple[int, ...]
    named: bool = True
    frozen: bool = False
