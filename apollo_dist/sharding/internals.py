"""Names of torch, DeepSpeed, transformers and accelerate that are not public: a missing one is an error.

The error names the attribute and the installed version. Layouts, and what the Hugging Face ``Trainer`` was asked for,
can only be read from attributes that other versions may rename or drop. Each file that reads some says first
which ones it needs, with ``require``, or asks for the first of several spellings with ``first_of``.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType
from typing import Any

_PACKAGES = {"torch": "torch", "deepspeed": "deepspeed", "transformers": "transformers", "accelerate": "accelerate"}


class UnknownInternals(RuntimeError):
    """The installed version of torch, DeepSpeed, transformers or accelerate does not have what is read from it."""


def version_of(package: str) -> str:
    """The version of an installed or imported package, such as "0.19.8"; "unknown" if it has none."""
    found = getattr(sys.modules.get(package), "__version__", None)
    if found is None:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"
    return str(found)


def require(owner: Any, *names: str) -> None:
    """Check that ``owner`` has all of these attributes.

    Args:
        owner: an object, class or module of torch or DeepSpeed.
        names: its attributes that are about to be read.

    Raises:
        UnknownInternals: if it lacks one; the message names the attribute, its owner and the installed version.
    """
    for name in names:
        first_of(owner, name)


def first_of(owner: Any, *names: str) -> Any:
    """The value of the first of these attributes that ``owner`` has: one thing, as several versions spell it.

    Raises:
        UnknownInternals: if it has none of them.
    """
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    kind = owner if isinstance(owner, (type, ModuleType)) else type(owner)
    where = kind.__name__ if isinstance(kind, ModuleType) else f"{kind.__module__}.{kind.__qualname__}"
    package = next((_PACKAGES[part] for part in where.split(".")[:1] if part in _PACKAGES), "torch")
    raise UnknownInternals(
        f"{package} {version_of(package)}: {where} has no {' or '.join(names)}, which APOLLO reads. Install a version "
        "of the table in docs/versions.md, or report this one"
    )
