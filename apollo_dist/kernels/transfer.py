"""Numbers from the host to a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values``, numbers or equally long sequences of them, on ``device``.

    ``torch.tensor(values, device=...)`` waits until a GPU has taken the numbers.
    """
    return moved(torch.tensor(values, dtype=dtype, device="cpu"), device)


def moved(made: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``.

    From pinned memory the copy is queued like a kernel; torch keeps that memory until the copy is done.
    """
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)
