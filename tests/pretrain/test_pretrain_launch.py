"""Whole runs through the launchers: engines agree, stopped runs continue, dead ranks and disagreements end the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from ..pretrain_runs import (
    ROOT,
    SMALL,
    SMALL_APOLLO,
    ZERO2,
    command,
    environment,
    losses,
    rewind,
    rows,
    run,
    run_different,
    succeed,
    validations,
    write_text,
)
from ..timeouts import allowed

STEPS = list(range(1, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, DeepSpeed's JSON, and the run of one process that all others are compared with."""
    base = tmp_path_factory.mktemp("launch")
    write_text(base / "text")
    (base / "zero2.json").write_text(json.dumps(ZERO2))
    (base / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    apollo = {"type": "APOLLO", "params": {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "seed": 0}}
    (base / "zero2_apollo.json").write_text(json.dumps({**ZERO2, "optimizer": apollo}))
    printed = succeed("python", 1, [*arguments("one"), *SMALL_APOLLO], base)
    (base / "one.log").write_text(printed)
    return base


def arguments(output: str, *more: str) -> list[str]:
    return [*SMALL, "--data=text", f"--output={output}", *more]


# launcher, and the options that choose the engine; micro-batches of 1 make two passes a step.
ENGINES = {
    "ddp": ("torchrun", ["--engine=ddp", "--micro_batch_size=1"]),
    "fsdp2": ("torchrun", ["--engine=fsdp2", "--micro_batch_size=1"]),
    "zero2": ("deepspeed", ["--deepspeed_config=zero2.json", "--micro_batch_size=1"]),
}
BY_ENGINE = [pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]


def two_ranks(folder: Path, name: str) -> Path:
    """The output of a run on two ranks with checkpoints at steps 4 and 8; made at first use."""
    launcher, options = ENGINES[name]
    if not (folder / name).exists():
        succeed(launcher, 2, [*arguments(name), *SMALL_APOLLO, *options, "--checkpoint_every=4"], folder)
    return folder / name


@pytest.mark.slow
def test_plain_python_writes_metrics_picture_and_summary(folder: Path) -> None:
    first = rows(folder / "one")[0]
    assert set(first) == {"step", "loss", "lr", "tokens", "tokens_per_s", "peak_memory", "elapsed"}
    assert sorted(losses(folder / "one")) == STEPS
    assert sorted(validations(folder / "one")) == [3, 6, 8]
    assert (folder / "one" / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = (folder / "one.log").read_text()
    summary = printed[printed.index("summary:") :]
    for part in ("training loss", "validation loss", "perplexity", "bits per byte", "tokens/s", "AdamW would take"):
        assert part in summary


@pytest.mark.parametrize("name", BY_ENGINE)
def test_two_ranks_equal_one_process(folder: Path, name: str) -> None:
    output = two_ranks(folder, name)
    assert losses(output) == pytest.approx(losses(folder / "one"), rel=2e-5)
    assert validations(output) == pytest.approx(validations(folder / "one"), rel=2e-5)


@pytest.mark.parametrize("name", BY_ENGINE)
def test_a_stopped_run_resumes_with_identical_losses(folder: Path, name: str) -> None:
    output = two_ranks(folder, name)
    launcher, options = ENGINES[name]
    rewind(output, folder / f"{name}_again", 4)
    succeed(launcher, 2, [*arguments(f"{name}_again"), *SMALL_APOLLO, *options, "--resume"], folder, forked=True)
    assert losses(folder / f"{name}_again") == losses(output)
    assert validations(folder / f"{name}_again") == validations(output)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["apollo", "adamw"])
def test_a_run_moves_between_engines_and_numbers_of_ranks(folder: Path, optimizer: str) -> None:
    """Every two steps to another place; the samples of each step, and so its loss, are those of one process."""
    options = [f"--optimizer={optimizer}", *(SMALL_APOLLO if optimizer == "apollo" else [])]
    succeed("python", 1, [*arguments(f"straight_{optimizer}"), *options], folder, forked=True)
    given = [*arguments(f"moving_{optimizer}"), *options, "--checkpoint_every=2"]
    places = [("zero3", 2), ("fsdp2", 4), ("ddp", 1), ("zero2", 2)]
    engines = {**ENGINES, "zero3": ("deepspeed", ["--deepspeed_config=zero3.json"])}
    for number, (name, world) in enumerate(places):
        launcher, engine = engines[name]
        more = [f"--stop_after={2 * number + 2}", *(["--resume"] if number else [])]
        printed = succeed(launcher, world, [*given, *engine, *more], folder, forked=True)
        assert not number or "the run moved (engine" in printed
    straight, moving = folder / f"straight_{optimizer}", folder / f"moving_{optimizer}"
    assert losses(moving) == pytest.approx(losses(straight), rel=2e-5)
    assert validations(moving) == pytest.approx(validations(straight), rel=2e-5)


def test_a_run_by_the_jsons_optimizer_moves_to_the_recipes(folder: Path) -> None:
    options = ["--deepspeed_config=zero2_apollo.json"]
    first = arguments("named", *options, "--checkpoint_every=4", "--stop_after=4")
    succeed("python", 1, first, folder, forked=True)
    succeed("python", 1, [*arguments("named"), *SMALL_APOLLO, "--resume"], folder, forked=True)
    assert losses(folder / "named") == pytest.approx(losses(folder / "one"), rel=2e-5)


def test_deepspeed_takes_the_optimizer_from_its_json(folder: Path) -> None:
    options = ["--deepspeed_config=zero2_apollo.json"]
    printed = succeed("python", 1, arguments("json", *options), folder, forked=True)
    assert "the optimizer is APOLLO from zero2_apollo.json" in printed
    assert losses(folder / "json") == pytest.approx(losses(folder / "one"), rel=2e-5)


@pytest.mark.parametrize(
    ("on_rank_1", "message"),
    [
        ("--seed=1", "seed is 0 on rank 0 and 1 on rank 1"),
        ("--stps=1", "rank 1: unknown option --stps; did you mean --steps?"),
        ("--data=text/text_0.txt", "data.path is 'text' on rank 0 and 'text/text_0.txt' on rank 1"),
    ],
)
def test_what_is_wrong_on_one_rank_ends_both_with_one_message(folder: Path, on_rank_1: str, message: str) -> None:
    common = [word for word in arguments("different") if not word.startswith("--data")]
    given = [[*common, "--data=text"], [*common, on_rank_1]]
    if not on_rank_1.startswith("--data"):
        given[1].append("--data=text")
    done = run_different(given, folder)
    assert done.returncode != 0
    for rank in range(2):
        assert f"[rank {rank}] error: " in done.stderr
    assert done.stderr.count(message) >= 2
    assert not (folder / "different" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_both_ranks(folder: Path) -> None:
    launcher, options = ENGINES["fsdp2"]
    damaged = (
        rewind(two_ranks(folder, "fsdp2"), folder / "damaged", 4) / "checkpoints" / "step_00000004" / "__1_0.distcp"
    )
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = run(launcher, 2, [*arguments("damaged"), *SMALL_APOLLO, *options, "--resume"], folder)
    assert done.returncode != 0
    for rank in range(2):
        assert f"[rank {rank}] error: " in done.stderr
    assert done.stderr.count("__1_0.distcp has") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["apollo", "adamw"])
@pytest.mark.parametrize("name", ["zero0", "zero0_bf16", "zero1", "zero2_bf16", "zero1_bf16_fp32_grads"])
def test_every_deepspeed_config_resumes_exactly(folder: Path, name: str, optimizer: str) -> None:
    file = ROOT / "ds_configs" / f"{name}.json"
    options = [f"--deepspeed_config={file}", "--micro_batch_size=1", f"--optimizer={optimizer}"]
    options += SMALL_APOLLO if optimizer == "apollo" else []
    whole = [*arguments(f"{name}_{optimizer}"), *options, "--checkpoint_every=4"]
    succeed("deepspeed", 2, whole, folder, forked=True)
    again = f"{name}_{optimizer}_again"
    rewind(folder / f"{name}_{optimizer}", folder / again, 4)
    succeed("deepspeed", 2, [*arguments(again), *options, "--resume"], folder, forked=True)
    assert losses(folder / again) == losses(folder / f"{name}_{optimizer}")
    if "bf16" not in name and optimizer == "apollo":
        assert losses(folder / again) == pytest.approx(losses(folder / "one"), rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_stays_near_fp32(folder: Path, engine: str) -> None:
    options = [f"--engine={engine}", "--precision=bf16"]
    succeed("torchrun", 2, [*arguments(f"{engine}_bf16"), *SMALL_APOLLO, *options], folder, forked=True)
    assert losses(folder / f"{engine}_bf16") == pytest.approx(losses(folder / "one"), rel=2e-2)
    assert losses(folder / f"{engine}_bf16") != losses(folder / "one")


@pytest.mark.slow
def test_kill_9_of_a_rank_ends_the_job_and_resume_continues(folder: Path) -> None:
    options = [*SMALL_APOLLO, "--deepspeed_config=zero2.json", "--eval_every=0", "--checkpoint_every=5"]
    options = [
        *(word for word in arguments("killed") if word.split("=")[0] not in ("--steps", "--eval_every")),
        *options,
    ]
    options += ["--steps=100000"]
    with (folder / "killed.log").open("w") as log:
        job = subprocess.Popen(command("deepspeed", 2) + options, cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        latest = folder / "killed" / "checkpoints" / "latest"
        wait_for(lambda: latest.exists() and latest.read_text() >= "step_00000010", 90)
        (victim,) = (
            process
            for process in psutil.Process(job.pid).children(recursive=True)
            if "--local_rank=1" in process.cmdline()
        )
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        code = job.wait(timeout=allowed(30))
        assert time.monotonic() - began < allowed(30)
        assert code != 0
    finally:
        if job.poll() is None:
            for process in psutil.Process(job.pid).children(recursive=True):
                process.kill()
            job.kill()
    before = losses(folder / "killed")
    checkpoint = int(latest.read_text().strip().removeprefix("step_"))
    last = max(before)
    assert last >= checkpoint
    # Two steps more than the killed run made, so that something is new even if it died right at a checkpoint.
    succeed("deepspeed", 2, [*options, "--resume", f"--stop_after={last + 2}"], folder, forked=True)
    after = losses(folder / "killed")
    assert sorted(after) == list(range(1, last + 3))
    assert {step: after[step] for step in before} == before
    # And what it never reached equals a run that was never killed.
    straight = [word for word in options if not word.startswith("--output")]
    succeed("deepspeed", 2, [*straight, "--output=straight", f"--stop_after={last + 2}"], folder, forked=True)
    assert losses(folder / "straight") == after


def wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + allowed(seconds)
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "the run did not get far enough in time"
        time.sleep(0.05)
