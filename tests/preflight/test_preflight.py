"""A preflight of real processes finds what differs, is missing or too small, and says on which rank."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from apollo_dist.__main__ import main

from ..pretrain_runs import ROOT, command, environment, free_port
from ..timeouts import allowed

NODES = "abcd"


@dataclass(frozen=True)
class Flown:
    """Exit codes and output of every rank, by rank."""

    codes: dict[int, int]
    out: dict[int, str]
    err: dict[int, str]
    seconds: float

    def row(self, name: str) -> str:
        """State, finding and remedy of a check, as rank 0 printed them."""
        found = re.search(rf"^  (\S+ +{name} .*(?:\n +->.*)?)$", self.out[0], re.MULTILINE)
        assert found, self.out[0] + self.err[0]
        return found[1]


def fly(
    folder: Path,
    options: list[str],
    *,
    world: int = 2,
    present: tuple[int, ...] = (0, 1),
    before: dict[int, list[str]] | None = None,
    more: dict[int, list[str]] | None = None,
    variables: dict[int, dict[str, str]] | None = None,
) -> Flown:
    """Start ranks as ``srun`` does, each on a node of its own; ``before`` stands before python in its command line."""
    port, began = free_port(), time.monotonic()
    jobs = {}
    for rank in present:
        env = {
            **environment(), "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": NODES[rank],
            **(variables or {}).get(rank, {}),
        }  # fmt: skip
        words = [*(before or {}).get(rank, []), sys.executable, "-m", "apollo_dist", "preflight", *options]
        jobs[rank] = subprocess.Popen(
            [*words, *(more or {}).get(rank, [])], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    ended = {rank: job.communicate(timeout=allowed(120)) for rank, job in jobs.items()}
    return Flown(
        {rank: job.returncode for rank, job in jobs.items()},
        {rank: out for rank, (out, _) in ended.items()},
        {rank: err for rank, (_, err) in ended.items()},
        time.monotonic() - began,
    )


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Flown:
    """Two ranks of which one has another package and another recipe, and limits that no machine keeps."""
    folder = tmp_path_factory.mktemp("unequal")
    shutil.copytree(ROOT / "apollo_dist", folder / "old" / "apollo_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "old" / "apollo_dist" / "_version.py").write_text('"""Older."""\n\n__version__ = "0.0.1"\n')
    recipe = (ROOT / "apollo_dist" / "pretrain" / "recipes" / "tiny.yaml").read_text()
    for name, text in (("a", recipe), ("b", recipe.replace("steps: 600", "steps: 601"))):
        (folder / name).mkdir()
        (folder / name / "own.yaml").write_text(text)
        (folder / name / "out").symlink_to(folder / "out")
    (folder / "out").mkdir()
    options = ["--recipe=own.yaml", "--output=out", "--min_bandwidth=1e9", "--min_free_disk=1000000TB", "--nodes=3"]
    return fly(
        folder,
        [*options, "--min_gpu_memory=80GB"],
        before={rank: ["env", "-C", NODES[rank]] for rank in (0, 1)},
        variables={1: {"PYTHONPATH": str(folder / "old")}},
    )


@pytest.mark.slow
def test_different_versions_name_the_ranks(unequal: Flown) -> None:
    row = unequal.row("versions")
    assert row.startswith("FAIL")
    assert re.search(r"apollo_dist 0\.1\.\d+ on rank 0 \(a\); 0\.0\.1 on rank 1 \(b\)", row)
    assert "apollo_dist code" in row
    assert "-> install the same environment" in row
    assert "torch" not in row


@pytest.mark.slow
def test_a_different_recipe_names_key_and_ranks(unequal: Flown) -> None:
    row = unequal.row("recipe")
    assert row.startswith("FAIL")
    assert "steps is 600 on rank 0 (a); 601 on rank 1 (b)" in row
    assert "-> give every rank the same command line" in row


def test_too_little_bandwidth_names_the_slowest_link(unequal: Flown) -> None:
    row = unequal.row("bandwidth")
    assert row.startswith("FAIL")
    assert "GB/s, ranks 0, 1 (a, b)" in row
    assert "--min_bandwidth is 1e+09 GB/s" in row
    assert "NCCL_SOCKET_IFNAME" in row


def test_too_little_room_and_gpus_and_nodes(unequal: Flown) -> None:
    assert unequal.row("checkpoints").startswith("FAIL")
    assert "--min_free_disk needs" in unequal.row("checkpoints")
    assert unequal.row("GPU").startswith("FAIL")
    assert unequal.row("ranks").startswith("FAIL")
    assert "2 of 2 rank(s) on 2 node(s): a 1, b 1; expected 3 node(s)" in unequal.row("ranks")


def test_every_rank_has_the_verdict_and_one_prints(unequal: Flown) -> None:
    assert unequal.codes == {0: 1, 1: 1}
    assert unequal.seconds < allowed(60)
    assert unequal.out[1] == ""
    assert unequal.out[0].endswith("preflight: failed\n")
    for well in ("clocks", "sums"):
        assert unequal.row(well).startswith("ok")


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a file system takes root")
@pytest.mark.parametrize(
    ("mount", "message", "remedy"),
    [
        ("size=64k", "No space left on device' on rank 1 (b)", "make room"),
        ("ro", "Read-only file system: 'out/checkpoints' on rank 1 (b)", "permissions and mounts"),
        ("size=64m", "rank 0 does not see what rank 1 (b) wrote", "storage that all machines share"),
    ],
)
def test_storage_that_is_full_or_read_only_or_not_shared(tmp_path: Path, mount: str, message: str, remedy: str) -> None:
    (tmp_path / "out").mkdir()
    words = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {mount} none out && exec "$@"', "sh"]
    flown = fly(tmp_path, ["--output=out", "--min_free_disk=0"], before={1: words})
    row = flown.row("checkpoints")
    assert row.startswith("FAIL")
    assert message.replace("'", "") in row.replace("'", ""), row
    assert remedy in row
    assert flown.codes == {0: 1, 1: 1}
    assert not list((tmp_path / "out").rglob(".preflight*"))


def test_a_file_in_place_of_the_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str], one_process: None) -> None:
    (tmp_path / "out").write_text("")
    assert main(["preflight", f"--output={tmp_path / 'out'}"]) == 1
    assert re.search(r"FAIL +checkpoints +cannot write: .*Not a directory.* on rank 0", capfd.readouterr().out)


@pytest.mark.slow
def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    flown = fly(tmp_path, ["--output=out", "--timeout=24"], world=4, present=(0, 2))
    row = flown.row("ranks")
    assert row.startswith("FAIL")
    assert "2 of 4 rank(s) on 2 node(s): a 1, c 1; ranks 1, 3 did not come" in row
    assert "-> look at its log" in row
    assert "not tried: ranks are missing" in flown.out[0]
    assert flown.codes == {0: 1, 2: 1}
    assert flown.seconds < allowed(60)


@pytest.mark.slow
def test_a_missing_first_rank_is_named_by_the_others(tmp_path: Path) -> None:
    flown = fly(tmp_path, ["--output=out", "--timeout=8"], present=(1,))
    assert flown.codes == {1: 1}
    assert "rank 1: rank 0 is missing: 127.0.0.1:" in flown.err[1]
    assert "did not answer within 4 s" in flown.err[1]
    assert flown.seconds < allowed(60)


@pytest.mark.slow
def test_all_is_well_under_torchrun(tmp_path: Path) -> None:
    words = ["preflight", "--output=out", "--nodes=1", "--ranks_per_node=2", "--recipe=tiny", "--engine=fsdp2"]
    done = subprocess.run(
        command("torchrun", 2, "apollo_dist") + words, cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=allowed(120),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: all is well" in done.stdout
    assert "FAIL" not in done.stdout
    assert re.search(r"ok +bandwidth +all_reduce [\d.]+ GB/s", done.stdout)
    assert "slowest node" in done.stdout
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stps=3"], "unknown option --stps; did you mean --steps?"),
        (["--batch_size=3", "--micro_batch_size=2"], "batch_size 3 is no multiple of micro_batch_size 2 x 1 ranks = 2"),
        (["--deepspeed_config=absent.json"], "deepspeed_config 'absent.json' does not exist"),
    ],
)
def test_options_of_the_run_are_checked(
    options: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--local_rank=0", "preflight", f"--output={tmp_path}", *options]) == 1
    row = re.search(r"FAIL +recipe .*", capfd.readouterr().out)
    assert row
    assert words in row[0]


def test_other_commands_still_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path), "--stps=3"])
