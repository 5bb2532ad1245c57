"""Runs for ``test_lightning.py``: the blocks of ``docs/integrations.md`` under Lightning, on two gloo ranks."""

from __future__ import annotations

import logging
import tempfile
from contextlib import chdir
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from ..llama import llama
from .blocks import dataset, run_documented, watched


def fitted(title: str) -> dict[str, float]:
    """Each weight's error against one process, after a block of the page has run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = llama()
    with chdir(tempfile.mkdtemp()), watched(model) as watch:
        found = run_documented(title, model=model, loader=DataLoader(dataset(), batch_size=2))
    return watch.errors(found["trainer"].model, prefix="model")


def fitted_fsdp1() -> dict[str, float]:
    """``FSDPStrategy`` on CPU, which it is not made for: Lightning refuses, and passes no device for FSDP1 to take."""
    from lightning.pytorch import strategies

    class OnCPU(strategies.FSDPStrategy):
        """The same; Lightning looks for the type FSDPStrategy itself."""

    make = FullyShardedDataParallel.__init__

    def make_on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "device_id": torch.device("cpu")})

    with (
        mock.patch.object(strategies, "FSDPStrategy", OnCPU),
        mock.patch.object(FullyShardedDataParallel, "__init__", make_on_cpu),
    ):
        return fitted("Lightning, FSDP1")


def everything(rank: int, world: int) -> dict[str, Any]:
    return {"FSDP2": fitted("Lightning, FSDP2"), "FSDP1": fitted_fsdp1()}
