"""``docs/clusters.md`` followed word for word by a new user, and the batch scripts as SLURM sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..pretrain_runs import ROOT, losses
from ..timeouts import allowed
from .slurm_cluster import Cluster, Job, steps_done
from .test_launch import BATCH, commands, value

pytestmark = pytest.mark.slow

# What stands for "13B" on two CPU cores.
TINY = (
    "--recipe tiny --steps 60 --warmup_steps 4 --batch_size 4 --sequence_length 32 --eval_every 0 "
    "--final_eval_sequences 4"
)


@pytest.mark.parametrize("script", BATCH)
def test_slurm_would_take_the_script(cluster: Cluster, script: str) -> None:
    done = cluster.try_run("sbatch", "--test-only", "--nodes=8", "--gpus-per-node=0", f"launch/{script}")
    assert done.returncode == 0, done.stderr
    assert "on nodes n[1-8]" in done.stderr


@pytest.mark.parametrize("nodes", [1, 2, 8])
@pytest.mark.parametrize("script", BATCH)
def test_dry_run_inside_of_a_job(cluster: Cluster, script: str, nodes: int) -> None:
    options = ["--dry-run", "--ranks_per_node=4", "--recipe=13B"]
    job = cluster.submit(f"--nodes={nodes}", "--gpus-per-node=0", f"launch/{script}", *options)
    job.wait(60)
    preflight, training = commands(job.log)
    assert value(preflight, "--nodes") == value(training, "--nodes") == str(nodes)
    assert value(training, "--master_addr") == "n1"
    assert value(training, "--cpus-per-task") == "2"
    assert value(preflight, "--ranks_per_node") == "4"
    name = script.removesuffix(".sbatch").replace("slurm_", "apollo-")
    assert value(training, "--output") == f"runs/{name}-{job.number}"
    assert not (ROOT / f"runs/{name}-{job.number}").exists()


def test_jobs_use_different_ports(cluster: Cluster) -> None:
    ports = set()
    for _ in range(2):
        job = cluster.submit("--nodes=1", "--gpus-per-node=0", "launch/slurm_fsdp.sbatch", "--dry-run")
        job.wait(60)
        ports |= {value(words, "--master_port") for words in commands(job.log)}
    assert len(ports) == 4


def test_a_script_without_its_repository_says_so(cluster: Cluster, tmp_path: Path) -> None:
    copy = shutil.copy(ROOT / "launch" / "slurm_fsdp.sbatch", tmp_path)
    job = cluster.submit("--nodes=1", "--gpus-per-node=0", f"--chdir={tmp_path}", copy, "--dry-run")
    # The repository is where sbatch was called.
    job.wait(60)
    words = f"cd {tmp_path} && sbatch --parsable --output=%j.out --nodes=1 --gpus-per-node=0 {copy} --dry-run"
    job = Job(cluster, cluster.run("bash", "-c", words).strip())
    job.wait(60, "FAILED")
    log = (tmp_path / f"{job.number}.out").read_text()
    assert "submit from the repository" in log


@pytest.mark.parametrize("script", BATCH)
def test_what_cannot_work_is_not_queued_again(cluster: Cluster, script: str, tmp_path: Path) -> None:
    words = ["--nodes=2", "--gpus-per-node=0", f"launch/{script}", "--recipe=tiny"]
    cases = {
        "preflight failed": ["--min_bandwidth=100000"],
        "failed before its first step": ["--skip_preflight", "--batch_size=3"],
    }
    jobs = [
        cluster.submit(*words, f"--output={tmp_path / str(number)}", *options)
        for number, options in enumerate(cases.values())
    ]
    for job, message in zip(jobs, cases, strict=True):
        job.wait(300, "FAILED")
        assert message in job.log
        assert job.fact("Restarts") == "0"
    assert "bandwidth" in jobs[0].log
    assert "batch_size 3 does not divide by 2 ranks" in jobs[1].log


def blocks(section: str) -> list[str]:
    """The shell blocks of a section of docs/clusters.md."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    body = text.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", body, re.DOTALL)


def checkout(folder: Path) -> Path:
    """A copy of this repository, installed."""
    copy = folder / "apollo_dist"
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "site.env")
    shutil.copytree(ROOT, copy, ignore=ignored)
    venv = copy / ".venv"
    venv.mkdir()
    for entry in (ROOT / ".venv").iterdir():
        if entry.name != "apollo-installed":
            (venv / entry.name).symlink_to(entry.resolve())
    # What launch/venv.sh leaves when it has installed: it need not do so again.
    names = ("setup.py", "pyproject.toml", "constraints.txt")
    hashed = subprocess.run(["sha256sum"], input=b"".join((copy / n).read_bytes() for n in names), capture_output=True)
    (venv / "apollo-installed").write_text(f"{hashed.stdout.decode().split()[0]} {copy}\n")
    return copy


class Shell:
    """A new user's shell on the login node."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._marker, self._log = folder / "marker", folder / "shell.log"
        kept = {key: text for key, text in cluster.environment.items() if key not in ("PYTHONPATH", "APOLLO_SITE")}
        self._output = self._log.open("w")
        self._shell = subprocess.Popen(
            cluster.command("bash"), env=kept, cwd=ROOT, stdin=subprocess.PIPE, stdout=self._output,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def type(self, text: str) -> str:
        """Type commands; what was printed. Each must succeed."""
        start = self._log.stat().st_size
        assert self._shell.stdin is not None
        lines = "".join(f"{line} || echo FAILED\n" for line in text.splitlines() if line)
        self._shell.stdin.write(f"{lines}touch {self._marker}\n")
        self._shell.stdin.flush()
        until(self._marker.exists, 60, self._log.read_text)
        self._marker.unlink()
        printed = self._log.read_text()[start:]
        assert "FAILED" not in printed, printed
        return printed

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        self._output.close()


def until(condition: Callable[[], bool], seconds: float, story: Callable[[], str]) -> None:
    deadline = time.monotonic() + allowed(seconds)
    while not condition():
        assert time.monotonic() < deadline, story()
        time.sleep(0.1)


def test_a_new_user_follows_the_page(cluster: Cluster, tmp_path: Path) -> None:
    copy = checkout(tmp_path)
    setup, look, submit, watch, stop, go_on = (
        block.replace("--recipe 13B", TINY) for block in blocks("From zero to a running job")
    )
    shell = Shell(cluster, tmp_path)
    output = copy / "runs" / "13B"
    try:
        shell.type(f"cd {copy}")
        shell.type(setup)
        with (copy / "launch" / "site.env").open("a") as site:  # "change what differs"
            site.write("export SBATCH_GPUS_PER_NODE=0\nexport ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16\n")
        preflight, training = commands(shell.type(look))
        assert (value(preflight, "--nodes"), value(training, "--output")) == ("2", "runs/13B")

        number = re.findall(r"Submitted batch job (\d+)", shell.type(submit))[-1]
        job = Job(cluster, number)
        log = copy / f"apollo-fsdp-{number}.out"
        until(lambda: steps_done(output) >= 3, 240, lambda: log.read_text())
        assert '"step"' in shell.type(watch)
        shell.type(stop)
        job.wait(120)
        reached = steps_done(output)
        assert reached < 60
        assert "not queued again" in log.read_text()

        (number,) = re.findall(r"Submitted batch job (\d+)", shell.type(go_on))
        Job(cluster, number).wait(240)
        text = (copy / f"apollo-fsdp-{number}.out").read_text()
        assert f"resumed after step {reached}" in text
        assert "ranks 2 -> 1" in text
        assert sorted(losses(output)) == list(range(1, 61))
        assert (output / "finished.json").exists()
    finally:
        shell.close()
