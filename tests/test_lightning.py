"""Lightning's strategies for FSDP, as ``docs/integrations.md`` shows them, against one process with whole matrices."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("transformers")

from .lightning_runs import everything
from .ranks import run_ranks

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.slow
def test_documented_strategies_equal_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        for case, found in result.items():
            worst = max(found, key=found.get)  # type: ignore[arg-type]
            assert found[worst] < TOLERANCE, f"{case}: {worst} is off by {found[worst]:.1e}"
