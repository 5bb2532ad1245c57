"""The optimizers beside APOLLO in real tools: by name in DeepSpeed's JSON, and prepared by Accelerate under FSDP2.

A tiny real LLaMA on two ranks, compared with one process with whole matrices, to 1e-5 relative in fp32.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from ..judge import judge
from ..ranks import run_ranks
from .rule_runs import everything


@pytest.mark.slow
def test_every_rule_equals_one_process() -> None:
    judge(run_ranks(everything, 2), 1e-5, lambda case: case.partition(", ")[2], "float32")
