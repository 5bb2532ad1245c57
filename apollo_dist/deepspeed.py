"""Making DeepSpeed know APOLLO by name.

DeepSpeed looks unknown optimizer types up in ``torch.optim``, and under ZeRO accepts only the classes on its own list
unless ``zero_allow_untested_optimizer`` is set. ``register`` puts our classes in both places, as DeepSpeed does for its
own Muon.
"""

from __future__ import annotations

import sys

import torch


def register(*classes: type[torch.optim.Optimizer]) -> None:
    """Make ``"optimizer": {"type": "APOLLO"}`` work in a DeepSpeed config.

    Never imports DeepSpeed itself. It is called when ``apollo_dist`` is imported and again whenever an optimizer is
    built, so DeepSpeed must be imported before the optimizer is built, not before ``apollo_dist``.
    """
    for cls in classes:
        setattr(torch.optim, cls.__name__, cls)
    utils = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None:
        supported.extend(cls for cls in classes if cls not in supported)
