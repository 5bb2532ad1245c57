"""Cross-entropy by token."""

from __future__ import annotations

from torch import Tensor, nn


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, fp32: logits (..., v) and targets (...) give (...)."""
    losses = nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view_as(targets)
