"""What of ``torch.distributed.checkpoint`` is calling: its functions by their code, found among the callers."""

from __future__ import annotations

import sys
from typing import Any


def called_to_make_state() -> bool:
    """Whether ``step()`` was called only so that state is made: DCP does so, with gradients of zero and lr 0.

    There is no other sign of it: a schedule may start at lr 0, and a first gradient may be zero.
    """
    return _called_by("_init_optim_state")


def _called_by(function: str) -> bool:
    """Whether a function of ``torch.distributed.checkpoint.state_dict`` is among the callers."""
    module: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    code = getattr(getattr(module, function, None), "__code__", None)
    frame = sys._getframe(1) if code is not None else None
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
