"""What the installed versions cannot do, for tests to be skipped there; each reason names the fault."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from apollo_dist.integrations.deepspeed_config.faults import known_faults, not_yet


def version(package: str) -> tuple[int, ...]:
    """The installed version as numbers, such as (2, 13, 0); () if it is not installed."""
    try:
        found = re.match(r"\d+(\.\d+)*", metadata.version(package))
    except metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, found.group().split("."))) if found else ()


TORCH, DEEPSPEED, TRANSFORMERS = version("torch"), version("deepspeed"), version("transformers")

# torch 2.6: "'Stream' object has no attribute 'record_event'" in its all-gather, for any model on CPUs.
FSDP2_ON_CPU = TORCH >= (2, 7)
needs_fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="torch 2.6's own FSDP2 does not run on CPUs")
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


def on_cpu(*engines: str) -> tuple[str, ...]:
    """Those of the engines that the installed torch runs on CPUs."""
    return tuple(engine for engine in engines if FSDP2_ON_CPU or not engine.startswith(("fsdp2", "hsdp")))


def deepspeed_runs(config: dict, world: int) -> bool:
    """Whether the installed DeepSpeed is right, and knows all settings, under a configuration on so many ranks."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage in (1, 2) and world > 1 and not ZERO12_ON_RANKS:
        return False
    installed = ".".join(map(str, DEEPSPEED))
    return not [*known_faults(config, installed), *not_yet(config, installed)]
