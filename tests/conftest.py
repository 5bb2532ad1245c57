"""Fixtures of several test files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from .slurm_cluster import fetch, reason_to_skip


@pytest.fixture(scope="session")
def slurm_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SLURM, sshd and pdsh, unpacked once for all tests; in ``SLURM_PREFIX`` if that is set. Skips without them."""
    prefix = Path(os.environ.get("SLURM_PREFIX") or tmp_path_factory.mktemp("packages"))
    reason = reason_to_skip() or fetch(prefix)
    if reason:
        pytest.skip(reason)
    return prefix


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pre-training runs of this process alone; one that raised leaves its process group behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("apollo_dist").setLevel(logging.WARNING)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
