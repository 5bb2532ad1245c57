"""What contributors are told: files and commands that CONTRIBUTING, the workflow and the issue templates name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from apollo_dist.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", ".github/workflows/tests.yml"])
def test_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # Paths in backticks, links and commands; those inside of the package are told from its folder, too.
    named = set(re.findall(r"(?:launch|tests|docs|ds_configs|apollo_dist)/[\w./-]*\w", text))
    named |= {
        f"apollo_dist/{path}" for path in re.findall(r"`((?:sharding|rules|state|exchange|projections)/[\w./]*)`", text)
    }
    missing = [path for path in named if not (ROOT / path).exists()]
    assert named
    assert not missing


def test_the_workflow_runs_quick_tests_always_and_everything_at_night() -> None:
    workflow: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert {"push", "pull_request", "schedule"} <= workflow[True].keys()  # YAML reads "on" as true
    steps = {name: " ".join(step.get("run", "") for step in job["steps"]) for name, job in workflow["jobs"].items()}
    assert "launch/run_tests.sh --fast" in steps["fast"]
    assert "launch/run_tests.sh" in steps["everything"]
    assert "--fast" not in steps["everything"]
    assert "schedule" in workflow["jobs"]["everything"]["if"]
    assert "launch/test_versions.sh ${{ matrix.versions }}" in steps["versions"]
    script = (ROOT / "launch" / "test_versions.sh").read_text(encoding="utf-8")
    lines = re.findall(r"VERSIONS=\(([^)]+:[^)]+)\)", script)[-1].split()
    assert workflow["jobs"]["versions"]["strategy"]["matrix"]["versions"] == lines


def test_issue_templates_ask_for_the_environment() -> None:
    assert any(module.__name__.endswith("reporting") for module in COMMANDS)
    for path in TEMPLATES:
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= template.keys()
        (asked,) = [item for item in template["body"] if item.get("id") == "env"]
        assert asked["attributes"]["label"] == "python -m apollo_dist env"
        if "bug" in template["labels"]:
            assert asked["validations"]["required"]
    assert len(TEMPLATES) == 2
