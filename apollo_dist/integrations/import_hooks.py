"""Do something to a module when it is first imported, without importing it."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)

Action = Callable[[ModuleType], None]


def wrap_function(owner: ModuleType | type, name: str, call: Callable[..., Any]) -> None:
    """Let ``call(function, *args, **kwargs)`` stand in for a function of a module or class.

    Where a version has no such function, one line in the log says so: what the call checks is then not checked.
    """
    function = getattr(owner, name, None)
    if function is None:
        package = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
        version = getattr(sys.modules.get(package.partition(".")[0]), "__version__", "unknown")
        _log.warning(
            "%s %s has no %s.%s, where apollo_dist looks whether another optimizer takes its place and learns the "
            "parameters' names; install a version of the table in docs/versions.md, or build the optimizer yourself",
            package.partition(".")[0], version, owner.__name__, name,
        )  # fmt: skip
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(function, *args, **kwargs)

    setattr(owner, name, wrapped)


def after_import(name: str, action: Action) -> None:
    """Run ``action(module)`` now if the module ``name`` is imported already, else right after its first import.

    Nothing is imported here. An import that fails leaves the action waiting for the next one.
    """
    module = sys.modules.get(name)
    if module is not None:
        action(module)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        # In front, for the others answer for every module that exists.
        sys.meta_path.insert(0, finder)
    finder.actions.setdefault(name, []).append(action)


class _Finder:
    """Lets the other finders find a module, and adds our actions to the end of its execution."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader, name)
        return spec

    def _extend(self, loader: Any, name: str) -> None:
        """Let the module's own loader run the actions last; it stays the module's loader for ``inspect`` and others."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            del loader.exec_module
            for action in self.actions.pop(name, []):
                action(module)

        loader.exec_module = exec_module
