"""``launch/hostfile_deepspeed.sh`` over a real sshd and pdsh, between machines with networks of their own."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from ..pretrain_runs import ROOT, losses
from ..timeouts import allowed
from .slurm_cluster import Cluster, ranks, steps_done

pytestmark = pytest.mark.slow

OPTIONS = (
    "--recipe tiny --deepspeed_config ds_configs/zero2.json --batch_size 4 --sequence_length 64 --warmup_steps 4 "
    "--eval_every 0 --final_eval_sequences 4 --checkpoint_every 10"
).split()


@pytest.fixture(scope="module")
def hosts(cluster: Cluster) -> Cluster:
    cluster.start_ssh()
    return cluster


def start(cluster: Cluster, folder: Path, *options: object) -> subprocess.Popen[str]:
    (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    script = ["bash", ROOT / "launch/hostfile_deepspeed.sh", "--hostfile", folder / "hosts", *OPTIONS]
    words = cluster.command("env", *script, "--output", folder / "run", *options)
    with (folder / "log").open("a") as log:
        return subprocess.Popen(words, cwd=ROOT, env=cluster.environment, stdout=log, stderr=log, text=True)


def everything(folder: Path) -> str:
    files = [folder / "log", *(folder / "run" / "logs").rglob("*.log")]
    return "".join(f"{path}:\n{path.read_text()}\n" for path in files)


def test_trains_on_two_hosts_stops_when_asked_and_goes_on(hosts: Cluster, tmp_path: Path) -> None:
    job = start(hosts, tmp_path, "--steps", 60, "--min_bandwidth", "0.0001")
    output = tmp_path / "run"
    deadline = time.monotonic() + allowed(240)
    while steps_done(output) < 5:
        assert job.poll() is None and time.monotonic() < deadline, everything(tmp_path)
        time.sleep(0.1)
    masters = {rank: process.environ()["MASTER_ADDR"] for rank, process in ranks(output).items()}
    assert masters == {0: "n1", 1: "n1"}
    (output / "STOP").touch()
    assert job.wait(allowed(120)) == 0, everything(tmp_path)
    reason = json.loads((output / "stopped.json").read_text())["reason"]
    assert reason == "STOP"
    reached = steps_done(output)
    assert reached < 60

    job = start(hosts, tmp_path, "--steps", 60, "--skip_preflight")
    assert job.wait(allowed(240)) == 0, everything(tmp_path)
    assert f"resumed after step {reached}" in everything(tmp_path)
    assert sorted(losses(output)) == list(range(1, 61))
