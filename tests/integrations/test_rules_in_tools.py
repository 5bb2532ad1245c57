"""The optimizers beside APOLLO in real tools: by name in DeepSpeed's JSON, and under FSDP2 in Accelerate, Lightning and
Hugging Face's Trainer.

A tiny real LLaMA on two ranks, compared with one process with whole matrices, to 1e-5 relative in fp32.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from ..judge import judge
from ..ranks import run_ranks
from .rule_runs import everything, everything_in_lightning


@pytest.mark.slow
def test_every_rule_equals_one_process() -> None:
    judge(run_ranks(everything, 2), 1e-5, lambda case: case.partition(", ")[2], "float32")


@pytest.mark.slow
def test_every_rule_equals_one_process_in_lightning() -> None:
    pytest.importorskip("lightning")
    judge(run_ranks(everything_in_lightning, 2), 1e-5, lambda case: case.partition(", ")[2], "float32")
