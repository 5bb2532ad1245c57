"""The functions that a step computes with: torch's operations, or Triton kernels over many matrices a launch.

A table is chosen once, when layouts are read (``choose``), by device and dtype and never by a tensor's value. Both have
the signatures of ``kernels.reference``, which defines what they compute.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("apollo_dist")

KERNELS = ("auto", "torch", "triton")
# Dtypes of gradients and weights that Triton's kernels know.
STORED = frozenset({torch.bfloat16, torch.float16, torch.float32})


class Kernels(NamedTuple):
    """The functions of one kind.

    Attributes:
        name: "torch" or "triton".
        stored: dtypes of gradients and weights that it takes as they are stored; others are converted to the dtype of
            the computation before.
        entries: the dtype of projections; None for that of the computation.
        together: whether a call is meant to take many matrices, and needs no temporary of a gradient's size.
        draw, draw_signs, project, moments, apply: as in ``kernels.reference`` and ``kernels.tuned``.
        adamw: the same; None where the rule's own pass is taken.
        apply_rows: the same; None where some rows at a time are converted, and ``apply`` is taken.
        add_up: as in ``kernels.reference``.
    """

    name: str
    stored: frozenset[torch.dtype]
    entries: torch.dtype | None
    together: bool
    draw: Callable[..., None]
    draw_signs: Callable[..., None]
    project: Callable[..., None]
    moments: Callable[..., None]
    apply: Callable[..., None]
    adamw: Callable[..., None] | None
    apply_rows: Callable[..., None] | None
    add_up: Callable[..., None]


@lru_cache
def torch_kernels() -> Kernels:
    """torch's operations."""
    from . import reference, tuned

    draws = reference.draw, reference.draw_signs
    return Kernels(
        "torch", frozenset(), None, False, *draws, tuned.project, tuned.moments, tuned.apply, None, None,
        reference.add_up,
    )  # fmt: skip


def check(wanted: Any) -> None:
    """Raise ValueError if ``wanted`` is no value of the option ``kernels``, or cannot be had in this environment."""
    if type(wanted) is not str or wanted not in KERNELS:
        raise ValueError(f'kernels must be "auto", "torch" or "triton", got {wanted!r}')
    if wanted == "triton" and not _installed():
        raise ValueError(
            'kernels="triton" needs Triton, which is not installed: pip install triton, or pass "auto" or "torch"'
        )


def choose(wanted: str, device: torch.device, dtype: torch.dtype, *, known: bool = True) -> Kernels:
    """The table for parameters of a device.

    Args:
        wanted: "torch"; "triton" for Triton's kernels wherever they know how; "auto" for that on CUDA devices only, if
            a trial of each kernel agrees with torch's operations there.
        device: of the gradients.
        dtype: of the computation; Triton's kernels know float32.
        known: whether all that is asked of the parameters is known to Triton's kernels.

    Raises:
        ValueError: for "triton" on a CPU, unless Triton's interpreter runs (``TRITON_INTERPRET=1``).
    """
    if wanted == "torch" or (wanted == "auto" and (device.type != "cuda" or not _installed())):
        return torch_kernels()
    if device.type == "cpu" and not _interpreted():
        raise ValueError(
            'kernels="triton" cannot run on a CPU, where these parameters are: pass kernels="auto" or "torch", or set '
            "TRITON_INTERPRET=1 to try the kernels in Triton's interpreter, which is slow"
        )
    if not known or dtype != torch.float32 or (wanted == "auto" and not works(device)):
        return torch_kernels()
    return _triton()


@lru_cache
def works(device: torch.device) -> bool:
    """Whether Triton's kernels agree with torch's operations on a device; a warning, once, if they do not."""
    from .trial import failure

    reason = failure(device)
    if reason is not None:
        logger.warning(
            "Triton's kernels do not work on %s, so kernels=\"auto\" takes torch's operations, which are slower: %s. "
            "Please report it with the output of python -m apollo_dist env",
            device,
            reason,
        )
    return reason is None


@lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from .triton.tables import interpreted

    return interpreted()


@lru_cache
def _triton() -> Kernels:
    from . import triton

    return Kernels(
        "triton", STORED, torch.bfloat16, True, triton.draw, triton.draw_signs, triton.project, triton.moments,
        triton.apply, triton.adamw, triton.apply_rows, triton.add_up,
    )  # fmt: skip
