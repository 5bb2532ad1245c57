"""What stands in the place of a launch of a Triton kernel: whoever counts or compiles them runs none."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from apollo_dist.kernels import triton as kernels


@contextmanager
def instead_of_launches(launch: Callable[..., None]) -> Iterator[None]:
    """Let every kernel call ``launch``, with the arguments of ``kernels.triton.tables.launch``, in that one's place."""
    with ExitStack() as stack:
        for found in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
            module = importlib.import_module(found.name)
            if hasattr(module, "launch") and not found.name.endswith(".tables"):
                stack.enter_context(patch.object(module, "launch", launch))
        yield
