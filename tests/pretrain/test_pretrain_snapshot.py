"""A run keeps what each of its starts was given, and can be started again from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import apollo_dist
from apollo_dist.pretrain.__main__ import main

from ..pretrain_runs import ROOT, SMALL, SMALL_APOLLO, environment, losses, succeed, write_text


def test_every_start_is_kept_and_the_recipe_makes_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    write_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    given = [*SMALL, *SMALL_APOLLO, "--optimizer.betas=0.8,0.99", f"--data={tmp_path}/text"]
    assert main([*given, "--output=run", "--stop_after=3"]) == 0
    config = tmp_path / "run" / "config"
    first = {path.name: path.read_text() for path in config.iterdir()}
    assert sorted(first) == ["command.txt", "environment.json", "recipe.yaml"]
    recipe = yaml.safe_load(first["recipe.yaml"])
    assert recipe["optimizers"]["apollo"]["betas"] == [0.8, 0.99]
    assert recipe["model"]["norm_eps"] == 1e-6  # a default
    about = json.loads(first["environment.json"])
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["apollo_dist"] == apollo_dist.__version__
    assert about["variables"]["SLURM_JOB_ID"] == "123"
    assert "secret" not in "".join(first.values())
    assert first["command.txt"].startswith(f"cd {tmp_path}\n")

    monkeypatch.setenv("SLURM_JOB_ID", "124")
    for number in (2, 3):
        assert main([*given, "--output=run", "--resume", "--stop_after=4"]) == 0
        second = json.loads((config / f"start-{number}" / "environment.json").read_text())
        assert second["variables"]["SLURM_JOB_ID"] == "124"
        assert second["step"] == number + 1
    assert {path.name: path.read_text() for path in config.iterdir() if path.is_file()} == first

    assert main(["--recipe=run/config/recipe.yaml", "--output=again", "--stop_after=4"]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_deepspeeds_json_is_kept_as_it_was_given_to_deepspeed(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    (tmp_path / "zero1.json").write_text('{"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}')
    options = ["--deepspeed_config=zero1.json", "--data=text", "--output=run", "--stop_after=1"]
    succeed("python", 1, [*SMALL, *SMALL_APOLLO, *options], tmp_path, forked=True)
    kept = json.loads((tmp_path / "run" / "config" / "deepspeed.json").read_text())
    assert kept["zero_optimization"] == {"stage": 1}
    assert kept["train_batch_size"] == 4
    recipe = yaml.safe_load((tmp_path / "run" / "config" / "recipe.yaml").read_text())
    assert recipe["deepspeed_config"] == str(tmp_path / "zero1.json")


def revision_of(package: Path, folder: Path) -> object:
    code = "import json; from apollo_dist.pretrain.versions import revision; print(json.dumps(revision()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**environment(), "PYTHONPATH": str(package)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_revision_is_that_of_the_packages_own_repository(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "apollo_dist", repository / "apollo_dist", ignore=shutil.ignore_patterns("__pycache__"))
    assert revision_of(repository, tmp_path) is None

    def git(*words: str) -> str:
        identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            ["git", "-C", str(repository), *words], capture_output=True, text=True, check=True,
            env={**os.environ, **identity},
        )  # fmt: skip
        return done.stdout.strip()

    git("init", "-q")
    (repository / ".gitignore").write_text("__pycache__\n")
    git("add", ".gitignore")
    git("commit", "-qm", "another project, whose environment holds the package")
    assert revision_of(repository, tmp_path) is None
    git("add", ".")
    git("commit", "-qm", "the package")
    assert revision_of(repository, tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (repository / "apollo_dist" / "_version.py").write_text('__version__ = "0.0.2"\n')
    found = revision_of(repository, tmp_path)
    assert isinstance(found, dict)
    assert found["dirty"]
