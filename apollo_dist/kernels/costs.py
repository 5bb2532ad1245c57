"""What our own kernels read, write and compute, told to whoever counts; on the meta device they do nothing else.

A kernel over many matrices is one launch, and no operation of torch that a dispatch mode would see. So on the meta
device, where nothing can be launched, each launch is told instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Cost(NamedTuple):
    """One launch: bytes, and floating-point operations.

    Attributes:
        name: of the kernel.
        read, written: bytes.
        tensor_core: arithmetic of products on tensor cores.
        other: all other arithmetic.
    """

    name: str
    read: int
    written: int
    tensor_core: int = 0
    other: int = 0


# What is called with each launch on the meta device.
LISTENERS: list[Callable[[Cost], None]] = []


def tell(cost: Cost) -> None:
    """Tell the listeners of a launch."""
    for listener in LISTENERS:
        listener(cost)
