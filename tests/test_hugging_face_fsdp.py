"""The Hugging Face ``Trainer`` and Accelerate under FSDP, and parameters that are replaced under the optimizer.

The ``Trainer`` builds the optimizer from bare parameters, and Accelerate exchanges the parameters of one that exists.
The matrices and projections must still be those of ``APOLLO(model)``: a tiny real LLaMA is trained on two ranks and
compared with one process with whole matrices, to 1e-5 relative in fp32. All runs (``hugging_face_fsdp_runs.py``) share
one pair of processes.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from .hugging_face_fsdp_runs import everything
from .ranks import run_ranks

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, 2)


@pytest.mark.slow
def test_every_case_equals_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        cases = {f"{tool}, {case}": found for tool in ("accelerate", "trainer") for case, found in result[tool].items()}
        cases["fully_shard after APOLLO(model)"] = result["sharded after a model"]
        for case, found in cases.items():
            assert isinstance(found, dict), f"{case}: {found}"
            worst = max(found, key=found.get)  # type: ignore[arg-type]
            assert found[worst] < TOLERANCE, f"{case}: {worst} is off by {found[worst]:.1e}"


@pytest.mark.slow
def test_the_choice_is_that_of_the_model(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["choices"] == ["layers.0.up.weight"]


@pytest.mark.slow
def test_whole_parameters_are_not_kept_in_memory(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["alive"] == 0


@pytest.mark.slow
def test_parameters_that_cannot_be_known_are_errors(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "21 parameters, among them mine.lm_head.weight, were replaced" in result["foreign"], result["foreign"]
        for case in ("parameters", "names"):
            message = result[f"sharded after {case}"]
            assert "none of the 21 parameters has a gradient or is sharded" in message, message
            assert "Build APOLLO after fully_shard, or as APOLLO(model)" in message
        assert "is not one of Linear's, so it has no name" in result["attached"], result["attached"]
