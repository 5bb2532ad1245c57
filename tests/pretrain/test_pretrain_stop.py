"""Runs that are asked to stop or to save: all ranks end or save after one step, and resume bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from apollo_dist.checkpoint import folder as checkpoint_folder
from apollo_dist.pretrain.__main__ import main
from apollo_dist.pretrain.metrics import Metrics
from apollo_dist.pretrain.stop import SIGNALS, STOPPED

from ..pretrain_runs import SMALL, SMALL_APOLLO, command, environment, losses, rows, succeed, validations, write_text
from ..timeouts import allowed

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("stop")
    write_text(base / "text")
    return base


def arguments(output: str, *more: str, steps: int = STEPS, eval_every: int = 20) -> list[str]:
    kept = [word for word in [*SMALL, *SMALL_APOLLO] if word.split("=")[0] not in ("--steps", "--eval_every")]
    return [*kept, f"--steps={steps}", f"--eval_every={eval_every}", "--data=text", f"--output={output}", *more]


@contextlib.contextmanager
def started(launcher: str, ranks: int, given: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run, with what it prints in ``OUTPUT.log``; nothing of it is left afterwards."""
    (output,) = (word.partition("=")[2] for word in given if word.startswith("--output="))
    with (folder / f"{output}.log").open("w") as log:
        job = subprocess.Popen(
            command(launcher, ranks) + given, cwd=folder, env=environment(), stdout=log, stderr=log, text=True
        )
        try:
            yield job
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(job.pid).children(recursive=True):
                    process.kill()
            job.kill()
            job.wait()


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + allowed(180)
    while not condition():
        assert job.poll() is None, f"the run ended by itself\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"nothing happened\n{log.read_text()[-4000:]}"
        time.sleep(0.005)


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def worker(job: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank under torchrun."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                found.append(process)
    (process,) = found
    return process


def curve(output: Path) -> list[tuple[object, ...]]:
    return [(r["step"], r.get("loss"), r.get("validation_loss"), r.get("lr"), r.get("tokens")) for r in rows(output)]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_resumes_bit_for_bit(folder: Path) -> None:
    options = ["--engine=fsdp2", "--micro_batch_size=1"]
    succeed("torchrun", 2, arguments("straight", *options), folder, forked=True)
    output, log = folder / "asked", folder / "asked.log"
    last = 0
    for number, again in ((signal.SIGUSR1, 3), (signal.SIGTERM, 0)):
        more = ["--resume"] if last else []
        with started("torchrun", 2, arguments("asked", *options, *more), folder) as job:
            wait_for(lambda goal=last + 5: steps_done(output) >= goal, job, log)
            rank_1 = worker(job, 1)
            seen = steps_done(output)
            rank_1.send_signal(number)
            for _ in range(again):  # during the checkpoint, as far as the timing goes
                time.sleep(0.02)
                with contextlib.suppress(psutil.Error):
                    rank_1.send_signal(number)
            assert job.wait(timeout=allowed(60)) != 0
        record = json.loads((output / "stopped.json").read_text())
        assert record["reason"] == number.name
        assert record["checkpoint"].endswith(f"step_{record['step']:08d}")
        assert last < record["step"] == steps_done(output) < STEPS
        assert record["step"] <= seen + 3  # a step may end before the signal is heard, and another before it is agreed
        text = log.read_text()
        assert text.count(f"exitcode  : {STOPPED}") == 2, text[-4000:]
        assert f"stopped after step {record['step']} ({number.name})" in text
        last = record["step"]
    with started("torchrun", 2, arguments("asked", *options, "--resume"), folder) as job:
        assert job.wait(timeout=allowed(90)) == 0, log.read_text()[-3000:]
    assert f"removed {Path('asked') / 'stopped.json'}" in log.read_text()
    assert not (output / "stopped.json").exists()
    assert json.loads((output / "finished.json").read_text())["step"] == STEPS
    assert curve(output) == curve(folder / "straight")
    elapsed = [row["elapsed"] for row in rows(output)]
    assert elapsed == sorted(elapsed)


@pytest.mark.slow
def test_signals_under_the_deepspeed_launcher(folder: Path) -> None:
    (folder / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    output, log = folder / "zero2", folder / "zero2.log"
    given = arguments("zero2", "--deepspeed_config=zero2.json", steps=100000, eval_every=0)
    with started("deepspeed", 2, given, folder) as job:
        wait_for(lambda: steps_done(output) >= 3, job, log)
        worker(job, 0).send_signal(signal.SIGUSR1)
        assert job.wait(timeout=allowed(60)) == STOPPED, log.read_text()[-3000:]
    assert json.loads((output / "stopped.json").read_text())["reason"] == "SIGUSR1"
    assert json.loads((output / "stopped.json").read_text())["step"] == steps_done(output)


@pytest.mark.slow
def test_a_signal_during_the_set_up_ends_before_the_first_step(folder: Path) -> None:
    output, log = folder / "early", folder / "early.log"
    with started("python", 1, arguments("early"), folder) as job:
        wait_for(lambda: heard(job.pid), job, log)
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait(timeout=allowed(60)) == STOPPED, log.read_text()[-3000:]
    record = json.loads((output / "stopped.json").read_text())
    assert (record["step"], record["reason"], record["checkpoint"]) == (0, "SIGTERM", None)
    assert "nothing to save yet" in log.read_text()
    assert losses(output) == {}
    with started("python", 1, arguments("early", "--resume", "--stop_after=1"), folder) as job:
        assert job.wait(timeout=allowed(60)) == 0, log.read_text()[-3000:]
    assert "nothing to resume: the run before was stopped before its first step" in log.read_text()
    assert sorted(losses(output)) == [1]
    assert (output / "checkpoints" / "step_00000001").exists()


def heard(pid: int) -> bool:
    """Whether a process handles SIGTERM by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


# Runs inside this process, whose requests are made when a step is written down.


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Do something, once, right after a step of the run has been written down."""
    original = Metrics.train

    def install(step: int, work: Callable[[], object]) -> None:
        def train(self: Metrics, row: dict[str, float]) -> None:
            original(self, row)
            if row["step"] == step:
                work()

        monkeypatch.setattr(Metrics, "train", train)

    return install


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch, one_process: None) -> None:
    monkeypatch.chdir(folder)


AtStep = Callable[[int, Callable[[], object]], None]


@pytest.mark.usefixtures("inside")
def test_a_stop_file_ends_the_run_and_is_removed(
    folder: Path, at_step: AtStep, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "file"
    output.mkdir()
    (output / "STOP").touch()  # of some earlier day
    at_step(5, (output / "STOP").touch)
    assert main(arguments("file")) == STOPPED
    printed = capsys.readouterr().out
    assert "removed file/STOP, made before this run started" in printed
    assert "stopped after step 6 (STOP), saved in file/checkpoints/step_00000006" in printed
    assert not (output / "STOP").exists()
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]
    assert not (output / "finished.json").exists()


@pytest.mark.usefixtures("inside")
def test_a_save_file_leaves_a_checkpoint_and_the_run_goes_on(folder: Path, at_step: AtStep) -> None:
    output = folder / "save"
    at_step(5, (output / "SAVE").touch)
    assert main(arguments("save", steps=10)) == 0
    assert [path.name for path in (output / "checkpoints").glob("step_*")] == ["step_00000006"]
    assert not (output / "SAVE").exists()
    assert json.loads((output / "finished.json").read_text())["checkpoint"] == "save/checkpoints/step_00000006"
    assert main(arguments("save", "--resume", steps=10)) == 0
    assert sorted(losses(output)) == list(range(1, 11))


@pytest.mark.usefixtures("inside")
def test_more_signals_while_the_checkpoint_is_written(
    folder: Path, at_step: AtStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    published = checkpoint_folder.publish

    def publish(*given: object) -> Path:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return published(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_folder, "publish", publish)
    assert main(arguments("twice", "--checkpoint_every=6", "--background_checkpoints")) == STOPPED
    record = json.loads((folder / "twice" / "stopped.json").read_text())
    assert record["step"] == 6
    assert record["reason"] == "SIGUSR1"
    assert sorted(path.name for path in (folder / "twice" / "checkpoints").iterdir()) == ["latest", "step_00000006"]
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("inside")
def test_a_validation_is_given_up_for_a_stop_and_made_up_for(
    folder: Path, at_step: AtStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"steps": 6, "eval_every": 6}
    assert main(arguments("valid", **short)) == 0
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments("given_up", **short)) == STOPPED
    assert validations(folder / "given_up") == {}
    assert json.loads((folder / "given_up" / "stopped.json").read_text())["step"] == 6
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(arguments("given_up", "--resume", **short)) == 0
    assert curve(folder / "given_up") == curve(folder / "valid")


@pytest.mark.usefixtures("inside")
def test_a_request_after_the_last_step_finishes_the_run(folder: Path, at_step: AtStep) -> None:
    at_step(6, (folder / "last" / "STOP").touch)
    assert main(arguments("last", "--stop_after=6")) == 0
    assert not (folder / "last" / "STOP").exists()
    assert not (folder / "last" / "stopped.json").exists()


@pytest.mark.usefixtures("inside")
def test_a_stop_whose_checkpoint_cannot_be_written_is_an_error(
    folder: Path, at_step: AtStep, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "blocked"
    output.mkdir()
    (output / "checkpoints").write_text("a file where the folder should be")
    at_step(5, (output / "STOP").touch)
    assert main(arguments("blocked")) == 2
    assert "checkpoints" in capsys.readouterr().err
    assert not (output / "stopped.json").exists()
