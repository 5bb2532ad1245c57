"""A checkpoint loads at any number of ranks and under any engine, and the run goes on as if it had never stopped."""

import pytest
import torch

from ..judge import assert_small
from ..models import relative_error
from ..ranks import run_ranks
from .checkpoint_runs import expected, leg

# (engine, number of ranks) one after the other. Six steps each: redraws fall inside and between.
CHAINS = {
    "torch": (torch.float64, 1e-9, [("fsdp2", 4), ("ddp", 2), ("hsdp", 4), ("plain", 1), ("fsdp2", 3)]),
    "layouts": (torch.float64, 1e-9, [("fsdp1", 4), ("fsdp2", 2), ("tp", 4), ("fsdp1", 3), ("plain", 1), ("fsdp1", 2)]),
    "fsdp1 and zero": (torch.float32, 1e-5, [("fsdp1", 2), ("zero3", 3), ("fsdp2", 2), ("zero3", 2), ("fsdp1", 3)]),
    "deepspeed": (torch.float32, 1e-5, [("zero3", 4), ("zero2", 2), ("fsdp2", 3), ("plain", 1), ("zero1", 2)]),
    "back": (torch.float32, 1e-5, [("zero2 round robin", 2), ("zero3 sub-groups", 3), ("zero3 persistent", 2)]),
    "bf16": (torch.bfloat16, 1e-5, [("zero2 bf16", 2), ("zero0 bf16", 1), ("zero3 bf16", 3), ("zero1 bf16", 2)]),
    "offload": (torch.float32, 1e-5, [("zero0", 2), ("zero3 offload", 2), ("zero2 offload", 3)]),
}
STEPS = 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_equals_an_undisturbed_run(name, tmp_path):
    dtype, tolerance, engines = CHAINS[name]
    legs = [(engine, world, range(STEPS * i, STEPS * (i + 1))) for i, (engine, world) in enumerate(engines)]
    for done, (engine, world, steps) in enumerate(legs, start=1):
        wanted = expected(legs[:done], dtype)
        results = run_ranks(leg, world, engine, str(tmp_path), steps, dtype)
        for weights in (
            results if engine != "zero0 bf16" else []
        ):  # its fp32 masters are not to be seen, but in the next
            errors = {name: relative_error(w, wanted[name]) for name, w in weights.items()}
            assert_small(f"{engine} at {world}", errors, tolerance)
