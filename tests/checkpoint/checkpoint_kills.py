"""Kill a save at each of its file operations, and in the middle of a write, and load what is left.

A program of its own: it forks a process for every kill, which is safe only while torch runs one thread. Prints what was
loaded after each, and ends with a traceback if it was anything but one of the two saved states.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

from apollo_dist import APOLLO, checkpoint

from ..models import Bag, gradients, groups_of, low_rank, shapes_of

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def build(seed: int) -> tuple[Bag, APOLLO]:
    """A model and its optimizer."""
    model = Bag(seed)
    return model, APOLLO(groups_of(model, low_rank(model, 3)), update_proj_gap=3)


def step(model: Bag, optimizer: APOLLO, number: int) -> None:
    """One step of training."""
    model(gradients(shapes_of(model), number, 0, torch.float32)).backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: Bag, optimizer: APOLLO) -> dict[str, torch.Tensor]:
    """Copies of all weights and states."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, slot in optimizer.state_dict()["state"].items():
        found |= {f"{name}/{k}": torch.as_tensor(v).clone() for k, v in slot.items() if k != "held"}
    return found


def killed_at(root: Path, number: int, save) -> bool:
    """Fork a process that saves and is killed at its ``number``-th file operation; whether it was."""

    def run() -> None:
        left = [number]

        def hook(event: str, arguments: tuple) -> None:
            path = arguments[0] if arguments else None
            if event in EVENTS and isinstance(path, (str, bytes, os.PathLike)) and str(root) in os.fsdecode(path):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save()

    return died(run)


def killed_after(size: int, save) -> bool:
    """Fork a process that saves and is killed when one of its files outgrows ``size`` bytes; whether it was."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        save()

    return died(run)


def died(run) -> bool:
    """Whether a forked process that runs ``run`` is ended by a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise AssertionError("the save failed, which it should not")
    return os.WIFSIGNALED(status)


def check(root: Path, states: dict[int, dict[str, torch.Tensor]]) -> int:
    """Load, compare every number, and save again; the step that was loaded."""
    model, optimizer = build(seed=99)
    found = checkpoint.load(root, model, optimizer)
    assert found.extra == {"step": found.step}
    assert found.problems == ()
    loaded = snapshot(model, optimizer)
    assert loaded.keys() == states[found.step].keys()
    for name, value in loaded.items():
        assert torch.equal(value, states[found.step][name]), name
    # Whatever the dead process left is in nobody's way.
    step(model, optimizer, 7)
    checkpoint.save(root, model, optimizer, {"step": 9}, step=9, keep=1)
    assert sorted(os.listdir(root)) == ["latest", "step_00000009"], os.listdir(root)
    assert checkpoint.find(root).problems == ()
    return found.step


def main(folder: Path) -> None:
    """Run all kills below ``folder``."""
    torch.set_num_threads(1)
    model, optimizer = build(seed=0)
    states = {}
    step(model, optimizer, 0)
    checkpoint.save(folder / "start", model, optimizer, {"step": 1}, keep=1)
    states[1] = snapshot(model, optimizer)
    step(model, optimizer, 1)
    states[2] = snapshot(model, optimizer)
    for again, keep in ((2, 1), (1, None)):
        # Step 2 is a new folder; step 1 (other weights under the same number) stands beside one of that name.
        states_now = {1: states[1], again: states[2]} if again == 2 else None
        for kill, amounts in ((killed_at, range(1, 1000)), (killed_after, (0, 100, 3000, 20000))):
            for amount in amounts:
                root = folder / f"{again}-{kill.__name__}-{amount}"
                shutil.copytree(folder / "start", root)

                def save(root: Path = root, again: int = again, keep: int | None = keep) -> None:
                    checkpoint.save(root, model, optimizer, {"step": again}, step=again, keep=keep)

                arguments = (root, amount, save) if kill is killed_at else (amount, save)
                killed = kill(*arguments)
                if states_now is not None:
                    print(kill.__name__, amount, "killed" if killed else "finished", "loaded", check(root, states_now))
                else:
                    print(
                        kill.__name__, amount, "killed" if killed else "finished", "same step", same_step(root, states)
                    )
                shutil.rmtree(root)
                if not killed:
                    break


def same_step(root: Path, states: dict[int, dict[str, torch.Tensor]]) -> int:
    """Which of the two states that were saved as step 1 is loaded."""
    model, optimizer = build(seed=99)
    found = checkpoint.load(root, model, optimizer)
    assert (found.step, found.problems) == (1, ())
    loaded = snapshot(model, optimizer)
    matching = [number for number, state in states.items() if all(torch.equal(loaded[k], v) for k, v in state.items())]
    assert len(matching) == 1
    return matching[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
