"""Runs for ``tests/test_lightning.py``: the blocks of ``docs/integrations.md`` under Lightning, on two gloo ranks."""

from __future__ import annotations

import logging
import tempfile
from contextlib import chdir
from typing import Any
from unittest import mock

from torch.utils.data import DataLoader

from .integrations import dataset, run_documented, watched
from .llama import llama


def fitted(title: str) -> dict[str, float]:
    """Each weight's error against one process, after a block of the page has run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = llama()
    with chdir(tempfile.mkdtemp()), watched(model) as watch:
        found = run_documented(title, model=model, loader=DataLoader(dataset(), batch_size=2))
    return watch.errors(found["trainer"].model, prefix="model")


def everything(rank: int, world: int) -> dict[str, Any]:
    from lightning.pytorch import strategies

    class OnCPU(strategies.FSDPStrategy):
        """The same: Lightning refuses CPUs for the type FSDPStrategy itself."""

    with mock.patch.object(strategies, "FSDPStrategy", OnCPU):
        fsdp1 = fitted("Lightning, FSDP1")
    return {"FSDP2": fitted("Lightning, FSDP2"), "FSDP1": fsdp1}
