"""Fixtures of several test files."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pre-training runs of this process alone; one that raised leaves its process group behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("apollo_dist").setLevel(logging.WARNING)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
