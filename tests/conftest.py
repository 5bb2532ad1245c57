"""Fixtures of several test files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Where no GPU is, Triton's kernels run in its interpreter, which Triton must know before anybody imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from .launch.slurm_cluster import Cluster, fetch, reason_to_skip
from .timeouts import allowed

# Seconds after which a case that waits for ever fails, with the place where it waits. Every wait of a case has a
# shorter deadline of its own: this one is for what nobody thought of.
HANGS = 600

# Files whose cases share what one process of pytest makes, in the order in which they run: what sshd needs is mounted
# for the last. All others stay together by file.
GROUPS = dict.fromkeys(("test_slurm.py", "test_slurm_docs.py", "test_hostfile.py"), "cluster")
# The longest groups start first, or one process would wait for the other at the end. The cluster's cases mostly wait.
FIRST = ("cluster",)


def file_of(nodeid: str) -> str:
    """The name of a case's file."""
    return nodeid.partition("::")[0].rpartition("/")[2]


def group_of(nodeid: str) -> str:
    """The group of a case: with pytest-xdist a group runs in one process, whose fixtures its cases share."""
    return GROUPS.get(file_of(nodeid), file_of(nodeid))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest groups first, and all others in their order; none for ever."""
    first = {group: number for number, group in enumerate(FIRST)}
    inside = {file: number for number, file in enumerate(GROUPS)}
    items.sort(key=lambda item: (first.get(group_of(item.nodeid), len(FIRST)), inside.get(file_of(item.nodeid), 0)))
    if config.pluginmanager.hasplugin("timeout"):  # pytest-timeout
        # A signal is not heard inside of C++, where a hang is likely. A thread ends the whole process, which
        # pytest-xdist reports.
        method = "thread" if hasattr(config, "workerinput") else "signal"
        for item in items:
            item.add_marker(pytest.mark.timeout(allowed(HANGS), method=method))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """By groups, and not by xdist_group marks, which pytest-xdist 3.8 does not see under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def slurm_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SLURM, sshd and pdsh, unpacked once for all tests; in ``SLURM_PREFIX`` if that is set. Skips without them."""
    prefix = Path(os.environ.get("SLURM_PREFIX") or tmp_path_factory.mktemp("packages"))
    reason = reason_to_skip() or fetch(prefix)
    if reason:
        pytest.skip(reason)
    return prefix


@pytest.fixture(scope="session")
def shared_cluster(slurm_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The SLURM cluster of all tests, with eight nodes; take ``cluster``."""
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", slurm_packages, 8) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without any job, before and after the cases of a file."""
    shared_cluster.clear()
    yield shared_cluster
    shared_cluster.clear()


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pre-training runs of this process alone; one that raised leaves its process group behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("apollo_dist").setLevel(logging.WARNING)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
