"""``--loss liger``: the fused linear cross-entropy of Liger-Kernel (Hsu et al., arXiv 2410.10989), on CUDA devices.

It makes the logits of some tokens at a time, as the chunked loss does, and their softmax, loss and gradient in one
Triton kernel. Losses of single tokens need its version 0.8.2: before, gradients of the head were wrong for them
(linkedin/Liger-Kernel#1298). In each pass it asks the device how many targets there are, and so the host waits.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version

import torch
from torch import Tensor

OLDEST = (0, 8, 2)


def check_liger() -> None:
    """Raise ValueError where the kernel cannot run: without a GPU, the package, or a version that is right."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "--loss liger needs a CUDA device and the package liger-kernel: pip install 'apollo-dist[liger]', or take "
            "--loss chunked, which needs no more memory"
        )
    found = version("liger-kernel")
    if tuple(int(number) for number in re.findall(r"\d+", found)[:3]) < OLDEST:
        raise ValueError(
            f"--loss liger with liger-kernel {found}: before {'.'.join(map(str, OLDEST))} its gradients are wrong for "
            "losses of single tokens; pip install -U liger-kernel, or take --loss chunked"
        )


def liger_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses (n,) in nats, fp32, of n tokens.

    Args:
        hidden: what the output layer sees, (n, h).
        weight: of the output layer, (v, h).
        targets: ids of the tokens that follow, (n,), int64.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # as ``nn.Linear`` converts its operands
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    losses: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
    return losses.float()
