"""Every Python block of the pages in ``PAGES`` runs, in one process, in a group of one rank, against a small model.

The blocks take ``model`` (with ``layers``) and ``loss_of(model)`` from their surroundings, as the text does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ..ranks import run_python

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "docs/engines.md", "docs/options.md", "docs/checkpoints.md")
TEXTS = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
BLOCKS = [block for text in TEXTS for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]

PREAMBLE = """
import os
import torch
import torch.distributed as dist
from torch import nn

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/rendezvous", rank=0, world_size=1)
try:
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for most of a minute
except ImportError:
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(256, 512, bias=False)
        self.down = nn.Linear(512, 256, bias=False)
        self.norm = nn.LayerNorm(256)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 256)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def loss_of(model):
    return model(torch.arange(16)).square().mean()


torch.manual_seed(0)
model = plain = Model()
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
"""

# Whatever the block built takes one more step, and every weight must have moved.
CLOSING = """
if "engine" in globals():
    engine.backward(loss_of(engine))
    engine.step()
else:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
for name, parameter in plain.named_parameters():
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    assert not torch.equal(full.detach(), before[name]), name
dist.destroy_process_group()
"""


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number: int, tmp_path: Path) -> None:
    block = BLOCKS[number]
    if "deepspeed" in block:
        pytest.importorskip("deepspeed")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    done = run_python(
        *("-c", PREAMBLE + block + CLOSING), cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_links_point_to_files() -> None:
    for page in [ROOT / "README.md", ROOT / "ds_configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_two_commands_are_there_word_for_word() -> None:
    assert "\n```bash\nbash launch/quickstart.sh\n```\n" in README
    assert "\n```bash\nbash launch/run_tests.sh\n```\n" in README


def test_the_same_python_versions_are_named_everywhere() -> None:
    setup, project, venv = ((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml", "launch/venv.sh"))
    assert "Python 3.11" in README
    assert 'python_requires=">=3.10"' in setup
    assert re.findall(r"Programming Language :: Python :: 3\.(\d+)", setup) == ["10", "11", "13"]
    assert 'target-version = "py310"' in project
    assert 'python_version = "3.10"' in project
    assert "sys.version_info < (3, 11)" in venv  # what constraints.txt takes
