"""A checkpoint loads at any number of ranks and under any engine, and the run goes on as if it had never stopped."""

import pytest
import torch

from .checkpoint_runs import expected, leg
from .models import relative_error
from .ranks import run_ranks

# (engine, number of ranks) one after the other. Six steps each: redraws fall inside and between.
CHAINS = {
    "torch": (torch.float64, 1e-9, [("fsdp2", 4), ("ddp", 2), ("hsdp", 4), ("plain", 1), ("fsdp2", 3)]),
    "deepspeed": (torch.float32, 1e-5, [("zero3", 4), ("zero2", 2), ("fsdp2", 3), ("plain", 1), ("zero1", 2)]),
    "into stage 3": (torch.float32, 1e-5, [("fsdp2", 2), ("zero3", 3), ("zero3", 2), ("ddp", 2)]),
    "deepspeed, round robin": (torch.float32, 1e-5, [("zero1", 3), ("zero2 round robin", 2), ("zero0", 2)]),
}
STEPS = 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_equals_an_undisturbed_run(name, tmp_path):
    dtype, tolerance, engines = CHAINS[name]
    legs = [(engine, world, range(STEPS * i, STEPS * (i + 1))) for i, (engine, world) in enumerate(engines)]
    for done, (engine, world, steps) in enumerate(legs, start=1):
        wanted = expected(legs[:done], dtype)
        for weights in run_ranks(leg, world, engine, str(tmp_path), steps, dtype):
            errors = {name: relative_error(w, wanted[name]) for name, w in weights.items()}
            worst = max(errors, key=errors.get)
            assert errors[worst] < tolerance, f"{engine} at {world}: {worst} is off by {errors[worst]:.1e}"
