"""Actions that wait for a module: run once, after its own code, whatever was imported first."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

from apollo_dist.integrations.import_hooks import after_import


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module that can be told to fail while it is imported."""
    folder = tmp_path / "waited_for"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("import os\nvalue = 1\nif 'FAIL' in os.environ: raise RuntimeError('as told')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "waited_for", raising=False)
    monkeypatch.delitem(sys.modules, "waited_for.inner", raising=False)
    return "waited_for.inner"


def test_an_action_waits_and_runs_once(name: str) -> None:
    seen: list[ModuleType] = []
    after_import(name, seen.append)
    after_import(name, lambda module: setattr(module, "value", module.value + 1))
    assert name not in sys.modules
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [module]
    assert module.value == 2, "actions come after the module's own code"
    assert "value = 1" in inspect.getsource(module)
    assert importlib.import_module(name) is module
    importlib.reload(module)
    assert len(seen) == 1


def test_an_imported_module_is_acted_on_at_once(name: str) -> None:
    module = importlib.import_module(name)
    seen: list[ModuleType] = []
    after_import(name, seen.append)
    assert seen == [module]


def test_a_failed_import_leaves_the_action_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    after_import(name, seen.append)
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(RuntimeError, match="as told"):
        importlib.import_module(name)
    assert seen == []
    monkeypatch.delenv("FAIL")
    assert [importlib.import_module(name)] == seen


def test_a_module_that_does_not_exist_stays_so() -> None:
    after_import("waited_for_in_vain", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("waited_for_in_vain")
