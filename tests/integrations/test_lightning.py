"""Lightning's strategies for FSDP, as ``docs/integrations.md`` shows them, against one process with whole matrices."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("lightning") is None:  # not imported here: that takes a second of each process that collects the tests
    pytest.skip("lightning is not installed", allow_module_level=True)
pytest.importorskip("transformers")

from ..llama import assert_equal_to_one_process
from ..ranks import run_ranks
from .lightning_runs import everything


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.slow
def test_documented_strategies_equal_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_equal_to_one_process(result)
