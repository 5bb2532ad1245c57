"""``--optimizer`` of every name: a real run, stopped and resumed to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollo_dist.pretrain.__main__ import main
from apollo_dist.pretrain.optimizer_config import OPTIMIZERS

from ..pretrain_runs import SMALL, SMALL_APOLLO, losses, write_text

LOW_RANK = {"apollo", "galore", "fira"}
# Every name, and what else there is of projections.
MORE = {
    "galore": "--optimizer.proj=subspace --optimizer.refresh=spread",
    "apollo": "--optimizer.proj=svd --optimizer.projection_dtype=bfloat16",
    "muon": "--optimizer.split=head",
}
CASES = [(name, "") for name in OPTIMIZERS] + list(MORE.items())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_run_trains_and_resumes(name: str, more: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    given = [*SMALL, f"--optimizer={name}", "--engine=fsdp2", "--checkpoint_every=4", f"--data={tmp_path / 'text'}"]
    given += more.split()
    if name in LOW_RANK:
        given += SMALL_APOLLO
    assert main([*given, f"--output={tmp_path / 'whole'}"]) == 0
    assert main([*given, f"--output={tmp_path / 'cut'}", "--stop_after=4"]) == 0
    assert sorted(losses(tmp_path / "cut")) == [1, 2, 3, 4]
    assert main([*given, f"--output={tmp_path / 'cut'}", "--resume"]) == 0
    found = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == found
    assert found[8] < found[1]
