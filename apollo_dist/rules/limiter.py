"""The norm-growth limiter of Fira (arXiv 2410.01623), which APOLLO uses too (eq. 4 of arXiv 2412.05270)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORM_EPS = 1e-8
GAMMA = 1.01


def limit(norm: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The norm-growth limiter, elementwise over matrices.

    Args:
        norm: the update's norm before limiting.
        last: the norm after limiting of the last step that moved; 0 while there was none.

    Returns:
        The factor 1 / l that limits the update, and the new ``last``. A norm of zero changes nothing: it must not arm
        the limiter, which would hold the matrix at 1e-8 for over a thousand steps.
    """
    # An update of norm 0 gives a factor of min(infinity, 1).
    reach = torch.where(last > 0, GAMMA * (last + NORM_EPS), math.inf)
    factor = (reach / norm).clamp_max_(1.0)
    return factor, torch.where(norm > 0, norm * factor, last)
