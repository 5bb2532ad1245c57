"""``python -m apollo_dist env`` and ``run``, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import apollo_dist
from apollo_dist.__main__ import main
from apollo_dist.integrations import trainer_optim

ROOT = Path(__file__).resolve().parents[2]


def test_env_says_what_a_report_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("ACCELERATE_TOKEN", "secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    found = dict(line.split(None, 1) for line in printed.splitlines())
    assert found["apollo_dist"].startswith(apollo_dist.__version__)
    assert "git " in found["apollo_dist"] or "no repository" in found["apollo_dist"]
    assert found["torch"].strip() == torch.__version__
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert {"CUDA", "NCCL", "gloo", "deepspeed", "transformers", "accelerate", "lightning", "CPU"} <= found.keys()
    assert found["NCCL_DEBUG"] == "INFO"
    assert "secret" not in printed


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}},
            "engine: ZeRO-2 (flat partitions of gradients and state), bf16, offload_optimizer to cpu, "
            "gradient_clipping not given",
        ),
        ({"gradient_clipping": 0.0}, "engine: ZeRO-0 (whole parameters), fp32, gradient_clipping 0.0"),
        ({"optimizer": {"type": "AdamW"}}, "lint: optimizer.type: 'AdamW' is another optimizer"),
        ({"zero_optimization": {"stage": 3}}, 'optimizer: "from the code"'),
    ],
)
def test_env_describes_a_deepspeed_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object], line: str
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert main(["env", "--deepspeed_config", str(tmp_path / "ds.json")]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_env_with_an_unreadable_file_prints_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    assert main(["env", "--deepspeed_config", str(tmp_path / "ds.json")]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("apollo_dist")
    assert "cannot be read: " in printed


def test_env_with_a_model_shows_its_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["env", "--model", "gpt2", "--rank", "64"]) == 0
    printed = capsys.readouterr().out.partition("choice of matrices, rank 64: gpt2")[2]
    assert "transformer.h.*.mlp.c_fc.weight" in printed
    assert main(["env", "--model", "no_such_model"]) == 2
    assert "cannot be read: " in capsys.readouterr().out


PROGRAM = """
import sys, apollo_dist, helper
with open(sys.argv[-1], "w") as file:
    file.write(f"{__name__} {helper.NAME} {sys.argv[1:-1]} {hasattr(__import__('torch').optim, 'APOLLO')}")
"""


@pytest.mark.parametrize("module", [False, True], ids=["script", "module"])
def test_run_runs_a_program_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: bool) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trainer_optim, "_replaced", False)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "helper.py").write_text("NAME = 'beside the script'\n")
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    target = [str(tmp_path / "program.py")]
    if module:
        monkeypatch.syspath_prepend(str(tmp_path))
        target = ["-m", "program"]
    out = tmp_path / "out"
    given = ["--replace-apollo-torch"] if module else []
    assert main(["--local_rank=0", "run", *given, *target, "--lr", "1", "-m", str(out)]) == 0
    assert out.read_text() == "__main__ beside the script ['--local_rank=0', '--lr', '1', '-m'] True"
    assert trainer_optim._replaced == module
