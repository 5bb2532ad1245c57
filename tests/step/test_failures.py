"""One rank's error is every rank's: failures injected at each place of a first step, on each rank in turn.

On the rank that fails the error keeps its type; the others raise a RankError that names it, within 20 s. A first step
that fails before weights change can be repeated: after all of them training equals the reference, float64 to 1e-9 and
ZeRO's float32 to 1e-5 (rounding, amplified over the steps).
"""

import pytest

from ..ranks import run_ranks
from .failure_runs import BUILDING, CHANGING, STEPPING, first_steps, later_steps
from .failure_runs_outside import others

ALWAYS = {*BUILDING, *CHANGING} - {"following the model", "looking for groups of ranks"}
# Whole parameters are exchanged with nobody; under ZeRO DeepSpeed looks for NaN.
EXCHANGE = {name for name in STEPPING if "exchange" in name or name == "projecting"}
NATIVE = {"following the model", "looking for NaN"}


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, ["plain", "ddp", "fsdp2"]),
        pytest.param(2, ["fsdp1"], marks=pytest.mark.slow),
        pytest.param(2, ["zero1", "zero2", "zero3"], marks=pytest.mark.slow),
        pytest.param(4, ["hsdp", "tp"], marks=pytest.mark.slow),
    ],
)
def test_first_step(world, layouts):
    for rank, found in enumerate(run_ranks(first_steps, world, layouts)):
        assert found.keys() == set(layouts)
        for layout, (wrong, reached, error) in found.items():
            assert not wrong, f"rank {rank}, {layout}: {wrong}"
            expected = ALWAYS | {"counting the step", "the owners' step"}
            expected |= set() if layout.startswith("zero") else NATIVE
            expected |= set() if layout in ("plain", "ddp") else EXCHANGE
            assert expected <= reached, f"rank {rank}, {layout}: {expected - reached} were not tried"
            assert error < (1e-5 if layout.startswith("zero") else 1e-9), f"{layout} is off by {error:.1e}"


@pytest.mark.slow
def test_later_steps():
    """Without a word before each collective: the rank that fails raises an alarm, which ends the others' waiting."""
    for rank, wrong in enumerate(run_ranks(later_steps, 2)):
        assert not wrong, f"rank {rank}: {wrong}"


def test_state_checkpoints_and_groups(tmp_path):
    for rank, wrong in enumerate(run_ranks(others, 2, str(tmp_path))):
        assert not wrong, f"rank {rank}: {wrong}"
