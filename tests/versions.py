"""What the installed versions cannot do, for tests to be skipped there; each reason names the fault.

Where a fault of an older version on CPUs alone would leave a layout untested, ``mend_torch`` mends it in the ranks.

Nothing of the package is imported with this module: ``same_bits.py`` trains older packages, with other modules, in
ranks that import it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.torch_version import TorchVersion


def version(package: str) -> tuple[int, ...]:
    """The installed version as numbers, such as (2, 13, 0); () if it is not installed."""
    try:
        found = re.match(r"\d+(\.\d+)*", metadata.version(package))
    except metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, found.group().split("."))) if found else ()


TORCH, DEEPSPEED, TRANSFORMERS = version("torch"), version("deepspeed"), version("transformers")

# Arguments of ``distribute_tensor`` for no communication, where torch knows them. Without, rank 0's values are taken:
# the same, where all ranks have the same.
LOCAL: dict[str, Any] = {"src_data_rank": None} if TORCH >= (2, 7) else {}
# torch 2.6 changes weights of FSDP2 in place on CPUs that autograd has kept: backward passes of other models than
# those of one product fail, and updates inside backward are wrong.
BACKWARD_ON_CPU = TORCH >= (2, 7)
BACKWARD_FAILS = "torch 2.6's FSDP2 fails in backward on CPUs: ... modified by an inplace operation"
needs_fsdp2 = pytest.mark.skipif(not BACKWARD_ON_CPU, reason=BACKWARD_FAILS)
needs_no_dist = pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6's torch.distributed.checkpoint has no no_dist")
# torch 2.6 and 2.8 raise KeyError where a flattened state lacks a parameter.
MISSING_STATES = TORCH >= (2, 11)
# 0.18.8 and 0.18.9 flatten parameters with their autograd history, also for SGD.
ZERO12_ON_RANKS = not (0, 18, 8) <= DEEPSPEED < (0, 19)
needs_zero12 = pytest.mark.skipif(
    not ZERO12_ON_RANKS,
    reason="DeepSpeed 0.18.8 and 0.18.9 raise in ZeRO-1 and 2: Output 0 of SplitBackward0 ...",
)
# The keys of bf16 are read from then on.
BF16_STATES = DEEPSPEED >= (0, 18, 3)
needs_bf16_states = pytest.mark.skipif(not BF16_STATES, reason="DeepSpeed before 0.18.3 has no bf16_optimizer_states")
# The names "apollo_adamw" and "apollo_adamw_layerwise" of ``TrainingArguments(optim=...)``.
APOLLO_NAMES = TRANSFORMERS >= (4, 49)
needs_apollo_names = pytest.mark.skipif(not APOLLO_NAMES, reason='transformers before 4.49 has no optim="apollo_adamw"')
# What the Trainer of transformers 4 makes of a mean over the 7 labels that 8 tokens have: it divides by 8.
LABELS = 1.0 if TRANSFORMERS >= (5,) else 7 / 8


def version_of_torch() -> TorchVersion:
    """torch's version, to be compared with strings."""
    return TorchVersion(torch.__version__)


def mend_torch() -> None:
    """Let FSDP2 run on CPUs with older versions of torch, as it does on GPUs there; called in every rank.

    torch 2.6 lacks two functions of its CPU streams, which have nothing to do. Before 2.11 gloo's reduce-scatter makes
    a sum of an average; here it is asked for a sum between two divisions, as FSDP2 does for fp16.
    """
    if version_of_torch() >= "2.11":
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    from apollo_dist.sharding import fsdp2

    for name in ("record_event", "wait_event"):
        if not hasattr(torch.cpu.Stream, name):
            setattr(torch.cpu.Stream, name, lambda *_: None)
    factors = collectives._get_gradient_divide_factors

    def around_a_sum(scatter: Any, reduce: Any, dtype: torch.dtype, *more: Any, **options: Any) -> Any:
        return factors(scatter, reduce, torch.float16, *more, **options)

    collectives._get_gradient_divide_factors = around_a_sum
    fsdp2.RIGHT_ON_CPU = "0"


def backward_on_cpu(*engines: str) -> tuple[str, ...]:
    """Those of the engines under which the installed torch updates inside backward on CPUs."""
    return tuple(engine for engine in engines if BACKWARD_ON_CPU or not engine.startswith(("fsdp2", "hsdp")))


def uneven_strides(shape: Sequence[int], placements: Sequence[Any], mesh: DeviceMesh) -> bool:
    """Whether the installed torch divides a shape so in the order that APOLLO reads."""
    from apollo_dist.sharding import dtensor

    if version_of_torch() >= dtensor.UNEVEN_STRIDES:
        return True
    strided = [(axis, p) for axis, p in enumerate(placements) if isinstance(p, _StridedShard)]
    return all(shape[p.dim] % (mesh.size(axis) * p.split_factor) == 0 for axis, p in strided)


def looks_for_overflow(config: dict) -> bool:
    """Whether the installed DeepSpeed looks at all gradients before ZeRO's first call of ``step()``.

    In bf16 at stages 1 and 2 by ``check_grad_overflow``, whose default became true by 0.19.4. For fp32, and at stage 3,
    from the norm: 0.19.4 does not do so yet, 0.19.8 does.
    """
    stage = config["zero_optimization"]["stage"]
    if stage == 0:
        return True
    return (0, 19, 4) <= DEEPSPEED if "bf16" in config and stage < 3 else (0, 19, 8) <= DEEPSPEED


def knows(config: dict, key: str) -> bool:
    """Whether the installed DeepSpeed reads a key, as far as it refuses unknown ones in its section."""
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    from apollo_dist.sharding.deepspeed.faults import not_yet

    section, _, leaf = key.rpartition(".")
    models = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
    }
    if section in models and leaf not in models[section].model_fields:
        return False
    return not list(not_yet(config, ".".join(map(str, DEEPSPEED))))


def deepspeed_runs(config: dict, world: int) -> bool:
    """Whether the installed DeepSpeed is right, and knows all settings, under a configuration on so many ranks."""
    from apollo_dist.sharding.deepspeed.faults import known_faults, not_yet

    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage in (1, 2) and world > 1 and not ZERO12_ON_RANKS:
        return False
    installed = ".".join(map(str, DEEPSPEED))
    return not [*known_faults(config, installed), *not_yet(config, installed)]
