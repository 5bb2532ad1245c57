"""DeepSpeed ZeRO 0, 1, 2 equal one process with whole matrices, in fp32 to 1e-5 relative.

DeepSpeed's flats are fp32, so 25 steps of rounding in the gradients, norms and updates show at 1e-7 each; 1e-5 is that
with room for the limiter, which compares norms. A wrong element shows as 1e-2 or more.
"""

import pytest

from ..engines import zero_config
from ..judge import judge
from ..ranks import run_ranks
from ..versions import deepspeed_runs
from .zero_runs import OFFLOAD, engine_of, train

STEPS, GAP, TOLERANCE = 25, 8, 1e-5
ROUND_ROBIN = {"round_robin_gradients": True}
CPU = {"zero_force_ds_cpu_optimizer": False}

# name -> (DeepSpeed config, APOLLO options, what the run does besides)
CASES = {
    "zero0": (zero_config(0), {}, {}),
    "zero1": (zero_config(1), {"scale_type": "tensor", "scale": 4.0, "weight_decay": 0.1}, {}),
    "zero2": (zero_config(2), {"weight_decay": 0.1}, {}),
    "zero2 round robin": (zero_config(2, zero_optimization=ROUND_ROBIN), {}, {}),
    "zero1 round robin": (zero_config(1, zero_optimization=ROUND_ROBIN), {}, {}),
    "zero2 one group": (zero_config(2), {}, {"by_name": True}),
    "zero1 frozen": (zero_config(1), {}, {"frozen": "layers.1."}),
    "zero2 accumulation": (zero_config(2, gradient_accumulation_steps=2), {}, {"accumulation": 2}),
    "zero1 accumulation": (zero_config(1, gradient_accumulation_steps=2), {}, {"accumulation": 2}),
    "zero2 clipping": (zero_config(2, gradient_clipping=3.0), {}, {"clipping": 3.0}),
    "zero1 clipping": (zero_config(1, gradient_clipping=3.0), {"disable_nl": True}, {"clipping": 3.0}),
    "zero0 clipping": (zero_config(0, gradient_clipping=3.0), {}, {"clipping": 3.0}),
    "zero1 offload": (zero_config(1, zero_optimization=OFFLOAD, **CPU), {}, {"schedule": True}),
    "zero2 offload": (
        zero_config(2, zero_optimization=OFFLOAD, gradient_accumulation_steps=2, **CPU),
        {"scale_type": "tensor", "scale": 4.0},
        {"accumulation": 2},
    ),
    "zero2 offload round robin": (
        zero_config(2, zero_optimization={**OFFLOAD, **ROUND_ROBIN}, gradient_clipping=3.0, **CPU),
        {"weight_decay": 0.1},
        {"clipping": 3.0, "frozen": "layers.1."},
    ),
}


QUICK = ["zero1", "zero2 one group", "zero2 offload"]


def all_cases(rank: int, world: int, names: list[str]) -> dict[str, dict[str, float]]:
    return {
        name: train(rank, world, config, options, steps=STEPS, gap=GAP, **extra)
        for name, (config, options, extra) in ((name, CASES[name]) for name in names)
        if deepspeed_runs(config, world)
    }


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, QUICK),
        pytest.param(2, [name for name in CASES if name not in QUICK], marks=pytest.mark.slow),
        *(pytest.param(world, list(CASES), marks=pytest.mark.slow) for world in (1, 3)),
    ],
)
def test_equals_the_reference(world, names):
    judge(run_ranks(all_cases, world, names), TOLERANCE, engine_of, "float32")
