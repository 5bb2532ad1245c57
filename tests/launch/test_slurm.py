"""The batch scripts on two nodes of a real SLURM cluster: to completion, and through everything that ends a job."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest

from ..pretrain_runs import losses
from .slurm_cluster import Cluster, Job, ranks, steps_done

pytestmark = pytest.mark.slow

SCRIPTS = {"fsdp": "launch/slurm_fsdp.sbatch", "deepspeed": "launch/slurm_deepspeed.sbatch"}
# No GPU here: a rank for each node. Always the same nodes, for jobs to get into each other's way.
SIZES = ["--nodes=2", "--nodelist=n1,n2", "--gpus-per-node=0"]
STEPS, EVERY = 40, 8
# Short sequences, and few: starting up takes most of a job's time.
TRAINING = (
    f"--recipe tiny --steps {STEPS} --warmup_steps 4 --batch_size 4 --sequence_length 32 --eval_every 0 "
    f"--final_eval_sequences 4 --checkpoint_every {EVERY}"
).split()
ENGINES = {"fsdp": ["--engine", "fsdp2"], "deepspeed": ["--deepspeed_config", "ds_configs/zero2.json"]}
PATIENCE = 400  # seconds, on a machine that has more to do


@pytest.fixture(scope="module", params=sorted(SCRIPTS))
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def submit(
    cluster: Cluster,
    engine: str,
    output: Path,
    *sbatch: str,
    options: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Job:
    words = [*SIZES, "--time=30", *sbatch, SCRIPTS[engine], *ENGINES[engine], *TRAINING]
    return cluster.submit(*words, "--output", output, *options, **environment)


def holding(hold: Path) -> dict[str, str]:
    """The environment of a job whose ranks wait, when they start, while a file exists."""
    held = str(Path(__file__).with_name("held"))
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{held}{os.pathsep}{before}" if before else held, "APOLLO_TEST_HOLD": str(hold)}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, engine: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """(a) The losses of a job that nobody disturbs, preflight included."""
    output = tmp_path_factory.mktemp("undisturbed") / engine
    job = submit(cluster, engine, output, options=["--min_bandwidth", "0.0001"])
    job.wait(PATIENCE)
    assert job.fact("Restarts") == "0"
    assert (output / "finished.json").exists(), job.log
    assert "2 node(s) x 1 rank(s) on n1 n2" in job.log
    found = losses(output)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def check_starts(job: Job, reached: int) -> list[int]:
    """Each start went on after the newest checkpoint there was, the first of them after ``reached``, until the end.

    There may be more starts than a test asks for: SLURM 22.05 repeats the order to end a step that a busy node did not
    confirm in time, and the repeated order meets the next start, whose step has the same number. It stops that start,
    or kills it, also before its first checkpoint.

    Returns:
        After which steps starts saved because they were asked to stop.
    """
    each = re.findall(r"newest checkpoint: step (\d+)((?:(?!newest checkpoint: step).)*)", job.log, re.DOTALL)
    found = [(int(newest), re.search(r"resumed after step (\d+)", rest)) for newest, rest in each]
    went_on = [(newest, int(line[1])) for newest, line in found if line]
    assert went_on and all(newest == step for newest, step in went_on), job.log
    steps = [step for _, step in went_on]
    assert steps[0] == reached and steps == sorted(steps), job.log
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+)", job.log)]
    assert set(stopped) <= set(steps), job.log
    return stopped


def check_lost_start(job: Job, reached: int) -> None:
    """A start that was lost went on after its newest checkpoint, ``reached``, and every later stop was continued."""
    assert EVERY <= reached < STEPS, job.log
    check_starts(job, reached)


def check_asked_start(job: Job, reached: int) -> None:
    """A start that was asked to stop saved after ``reached``, and this stop and every later one was continued."""
    assert 3 <= reached < STEPS, job.log
    assert check_starts(job, reached)[:1] == [reached], job.log


def newest_checkpoint(output: Path) -> int:
    """The step of the newest checkpoint of a run."""
    return max(int(path.name.split("_")[1]) for path in (output / "checkpoints").glob("step_*"))


def in_training(job: Job, output: Path, step: int = 3) -> None:
    job.wait_for_step(output, step, PATIENCE)


@contextlib.contextmanager
def suspended(output: Path) -> Iterator[None]:
    """Suspend the ranks of a run for a while: no machine is fast enough to finish meanwhile."""
    stopped = [*ranks(output).values()]
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@contextlib.contextmanager
def suspended_until_asked(job: Job, output: Path) -> Iterator[None]:
    """Suspend the ranks of a job until it has been asked to stop."""
    with suspended(output):
        yield
        job.wait_for(lambda: "asked to stop" in job.log, 100, "request to stop")


def test_runs_to_completion(undisturbed: dict[int, float]) -> None:
    assert undisturbed[STEPS] < undisturbed[1]


def test_goes_on_after_the_time_limit(
    cluster: Cluster, engine: str, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = submit(cluster, engine, output, "--signal=B:USR1@10", options=["--skip_preflight"])
    in_training(job, output)
    with suspended_until_asked(job, output):
        # SLURM looks every 30 s whether the signal is due, and a limit is in whole minutes: so move this start's end.
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 38))
        cluster.run("scontrol", "update", f"JobId={job.number}", f"EndTime={end}")
    job.wait_for(lambda: job.fact("Restarts") == "1", 100, "requeue")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")  # the end moved the limit, too
    reached = steps_done(output)
    job.wait(PATIENCE)
    check_asked_start(job, reached)
    assert losses(output) == undisturbed


def test_goes_on_after_preemption(cluster: Cluster, engine: str, undisturbed: dict[int, float], tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = submit(cluster, engine, output, options=["--skip_preflight"])
    in_training(job, output)
    with suspended_until_asked(job, output):
        urgent = cluster.submit("--partition=urgent", *SIZES, "--exclusive", "--wrap=sleep 1")
    urgent.wait(120)
    reached = steps_done(output)
    job.wait(PATIENCE)
    check_asked_start(job, reached)
    assert losses(output) == undisturbed


def test_goes_on_after_kill_9(cluster: Cluster, engine: str, undisturbed: dict[int, float], tmp_path: Path) -> None:
    output = tmp_path / "run"
    hold = tmp_path / "hold"
    job = submit(cluster, engine, output, options=["--skip_preflight"], environment=holding(hold))
    in_training(job, output, EVERY + 2)
    with suspended(output):
        hold.touch()
        ranks(output)[1].kill()
    job.wait_for(lambda: job.fact("Restarts") == "1", 60, "requeue")
    reached = newest_checkpoint(output)
    # And once more before the first step, as SLURM itself does it when a lost node comes back as the job starts again.
    job.wait_for(lambda: 1 in ranks(output), PATIENCE, "second start")
    ranks(output)[1].kill()
    job.wait_for(lambda: job.fact("Restarts") == "2", 60, "requeue")
    hold.unlink()
    job.wait(PATIENCE)
    assert "failed before its first step" in job.log
    check_lost_start(job, reached)
    assert losses(output) == undisturbed


def test_goes_on_after_a_node_was_cut_off(
    cluster: Cluster, engine: str, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    job = submit(cluster, engine, output, options=["--skip_preflight"])
    in_training(job, output, EVERY + 2)
    with suspended(output):
        cluster.run("ip", "link", "set", "v2", "down")
    try:
        job.wait_for(lambda: job.fact("Restarts") == "1", 120, "requeue")
        job.wait_for(lambda: job.fact("JobState") == "PENDING", 60, "place in the queue")  # n2 is lost
        reached = newest_checkpoint(output)
    finally:
        cluster.run("ip", "link", "set", "v2", "up")
    job.wait(PATIENCE)
    check_lost_start(job, reached)
    assert losses(output) == undisturbed


def test_a_cancelled_job_stays_away(cluster: Cluster, engine: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = submit(cluster, engine, output, options=["--skip_preflight"])
    in_training(job, output)
    cluster.run("scancel", job.number)
    job.wait(60, "CANCELLED")  # which SLURM says before the job has ended
    job.wait_for(lambda: "not queued again" in job.log, 60, "last words")
    time.sleep(8)  # longer than a job that was queued again is held back
    assert job.fact("JobState") == "CANCELLED", job.log
    assert "not queued again" in job.log
    assert not ranks(output)
