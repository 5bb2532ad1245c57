"""The starter of ranks: what a rank is given, how a failure, a hang and a dead template are told, and what it forks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .. import ranks as starter
from ..ranks import run_module_on_ranks, run_ranks
from ..template import PRELOADED, Template, template
from ..timeouts import VARIABLE, allowed


def surroundings(rank: int, world: int, word: str) -> dict[str, object]:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return {
        "rank": (rank, world, dist.get_rank(), dist.get_world_size(), os.environ["RANK"], os.environ["WORLD_SIZE"]),
        "sum": total.item(), "word": word, "variable": os.environ.get("FOR_RANKS"), "folder": os.getcwd(),
        "path": sys.path[0], "hash": hash("a string"), "threads": torch.get_num_threads(),
        "preloaded": all(name in sys.modules for name in PRELOADED[:4]), "pid": os.getpid(),
    }  # fmt: skip


def test_ranks_have_this_process_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOR_RANKS", "new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = run_ranks(surroundings, 3, "given")
    for rank, of_rank in enumerate(found):
        assert of_rank["rank"] == (rank, 3, rank, 3, str(rank), "3")
        assert of_rank["sum"] == 6
        assert (of_rank["word"], of_rank["variable"], of_rank["threads"]) == ("given", "new", 1)
        assert (of_rank["folder"], of_rank["path"]) == (str(tmp_path), str(tmp_path))
        assert of_rank["preloaded"]
    assert len({of_rank["pid"] for of_rank in found} | {os.getpid()}) == 4
    # Neighbours go through sets of strings in orders of their own, as launched processes do.
    assert found[0]["hash"] == found[2]["hash"] != found[1]["hash"]


def failing(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("of rank one")
    dist.barrier()


def dying(rank: int, world: int, which: int) -> None:
    if rank == which:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def hanging(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def test_a_failing_rank_is_told_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2:\nTraceback.*in failing.*ValueError: of rank one"):
        run_ranks(failing, 2)


@pytest.mark.parametrize(("which", "codes"), [(0, r"\[-11, -9\]"), (1, r"\[-9, -11\]")])
def test_a_rank_that_dies_ends_the_others(monkeypatch: pytest.MonkeyPatch, which: int, codes: str) -> None:
    monkeypatch.setattr(starter, "GRACE_S", 0.1)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=codes):
        run_ranks(dying, 2, which)
    assert time.monotonic() - began < allowed(60)


def test_ranks_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"ranks did not end within 1.5 s"):
        run_ranks(hanging, 2, timeout=1.5)
    # Nothing of them is left in the way of the next.
    assert [found["sum"] for found in run_ranks(surroundings, 2, "")] == [3, 3]


@pytest.mark.slow
def test_a_template_that_died_is_replaced() -> None:
    run_ranks(surroundings, 1, "")
    old = template(0)
    os.kill(old._process.pid, signal.SIGKILL)
    old._process.wait()
    assert run_ranks(surroundings, 1, "again")[0]["word"] == "again"
    assert template(0) is not old


def test_a_rank_whose_template_dies_is_an_error() -> None:
    made = Template(hash_seed=0, preloaded=())
    child = made.fork(time.sleep, 600)
    os.kill(made._process.pid, signal.SIGKILL)
    with pytest.raises(AssertionError, match="template of the ranks has died"):
        child.wait(60)
    with pytest.raises(AssertionError, match="template of the ranks has died"):
        made.fork(time.sleep, 600)


def imported(path: str, names: list[str]) -> None:
    found = {name: name in sys.modules for name in names}
    Path(path).write_text(json.dumps(found))


def test_what_starts_a_thread_is_not_preloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "busy.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    (tmp_path / "broken.py").write_text("raise RuntimeError('of its own')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["wave", "busy", "broken", "absent", "colorsys"]
    made = Template(hash_seed=0, preloaded=names)
    assert made.fork(imported, str(tmp_path / "found"), names).wait(60) == 0
    found = json.loads((tmp_path / "found").read_text())
    assert {name for name in names if found[name]} == {"wave", "colorsys"}
    errors = capfd.readouterr().err
    assert "busy starts a thread and is not preloaded" in errors
    assert "broken is not preloaded: of its own" in errors


def test_a_module_runs_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "of_this_test.py").write_text(
        "import atexit, os, sys\n"
        "assert __name__ == '__main__'\n"
        "atexit.register(print, 'end of', os.environ['NAME'])\n"
        "print(sys.argv[1:], flush=True)\n"
        "print('aside', file=sys.stderr)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    environments = [{**os.environ, "NAME": name, "PYTHONPATH": str(tmp_path)} for name in ("first", "second")]
    sys.path.insert(0, str(tmp_path))
    try:
        done = run_module_on_ranks("of_this_test", [["0", "x"], ["3"]], environments, tmp_path)
        good = run_module_on_ranks("of_this_test", [["0"]], environments[:1], tmp_path)
    finally:
        sys.path.remove(str(tmp_path))
    assert done.returncode == 3
    for line in ("['0', 'x']", "['3']", "end of first", "end of second"):
        assert line in done.stdout.splitlines()
    assert done.stderr.splitlines() == ["aside"] * 2
    assert (good.returncode, good.stdout.splitlines()) == (0, ["['0']", "end of first"])


def test_one_setting_scales_every_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert allowed(20) == 20
    monkeypatch.setenv(VARIABLE, "2.5")
    assert allowed(20) == 50
    for wrong in ("0", "-1", "much", "inf", "nan"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{VARIABLE}={wrong} is not a positive number"):
            allowed(20)
