"""What of ``torch.distributed.checkpoint`` is calling: its functions by their code, found among the callers."""

from __future__ import annotations

import inspect
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
    # Without decorators, whose code all that they decorate share.
    code = getattr(inspect.unwrap(getattr(module, function)), "__code__", None) if hasattr(module, function) else None
    frame = sys._getframe(1) if code is not None else None
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def called_to_load_into() -> bool:
    """Whether ``state_dict()`` was called for its form only: DCP writes whole tensors, which it has, into the parts."""
    return _called_by("_load_optim_state_dict")
