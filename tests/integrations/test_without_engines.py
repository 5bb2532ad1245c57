"""The core works without DeepSpeed, transformers and accelerate, and commands that need an extra name it."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from apollo_dist.integrations.extras import EXTRAS

from ..timeouts import allowed

ROOT = Path(__file__).resolve().parents[2]
# Runs in a process of its own. Each case blocks some modules, and imports and uses a fresh apollo_dist.
CODE = """
import importlib.abc, sys, torch
from torch import nn

class Blocker(importlib.abc.MetaPathFinder):
    blocked = ()
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, blocker := Blocker())
for case in sys.argv[1:]:
    blocker.blocked = tuple(case.split(","))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("apollo_dist", *blocker.blocked)]:
        del sys.modules[name]
    import apollo_dist, apollo_dist.layerwise, apollo_dist.checkpoint, apollo_dist.__main__
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 16)])}).double()
    optimizer = apollo_dist.APOLLO(model, lr=0.01, rank=4)
    for _ in range(3):
        loss = model["layers"][1](model["layers"][0](torch.ones(2, 16).double())).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other = apollo_dist.APOLLO(model, lr=0.01, rank=4)
    other.load_state_dict(optimizer.state_dict())
    loaded = [name for name in blocker.blocked if name in sys.modules]
    assert not loaded, loaded
    print(case, float(loss))
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=allowed(200))


@pytest.mark.slow
def test_the_core_needs_no_engine():
    names = ("deepspeed", "transformers", "accelerate")
    cases = [*combinations(names, 2), names, ("tqdm", "datasets", "tokenizers", "matplotlib", *names)]
    done = python("-c", CODE, *(",".join(case) for case in cases))
    assert done.returncode == 0, done.stderr
    losses = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert len(losses) == len(cases)
    assert len(set(losses)) == 1  # whatever is missing, the same step


BLOCKED = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = {arguments!r}
runpy.run_module({command!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "command", "arguments", "extra"),
    [
        pytest.param("tqdm", "apollo_dist.pretrain", ["--recipe=tiny"], "pretrain", marks=pytest.mark.slow),
        pytest.param("transformers", "apollo_dist.pretrain", ["--recipe=tiny"], "pretrain", marks=pytest.mark.slow),
        ("transformers", "apollo_dist", ["plan", "tiny"], "pretrain"),
    ],
)
def test_a_command_names_the_extra(tmp_path, module, command, arguments, extra):
    code = BLOCKED.format(module=module, command=command, arguments=[command, *arguments])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=allowed(200),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{module} is not installed; it comes with an extra: pip install 'apollo-dist[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_extra_is_one_of_setup():
    text = (ROOT / "setup.py").read_text()
    for module, extra in EXTRAS.items():
        assert f'"{extra}": ' in text
        assert module in text or module == "safetensors"  # which comes with transformers
