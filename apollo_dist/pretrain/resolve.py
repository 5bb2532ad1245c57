"""What a run will be, from its settings and the number of ranks: checked before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apollo_dist.integrations.extras import not_installed
from apollo_dist.pretrain.batching import BatchPlan, plan_batch
from apollo_dist.pretrain.compute import check_compute
from apollo_dist.pretrain.engines.deepspeed_json import DeepSpeedJson, reconcile
from apollo_dist.pretrain.int8 import check_int8
from apollo_dist.pretrain.metrics import check_loggers
from apollo_dist.sharding.deepspeed.faults import installed, known_faults

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.settings import Settings


def resolve(settings: Settings, world: int) -> tuple[Config, DeepSpeedJson | None, BatchPlan]:
    """The configuration with the values of DeepSpeed's JSON, that JSON if there is one, and how a step is divided.

    Raises ValueError where they contradict each other, batches do not divide by ``world`` ranks, a package that the run
    needs is not installed, or the installed DeepSpeed is known to train wrongly with this JSON.
    """
    engine = ("deepspeed",) if settings.config.deepspeed_config is not None else ()
    absent = not_installed("tqdm", "transformers", *engine)
    if absent:
        raise ValueError(absent)
    config, json = reconcile(settings, world)
    check_loggers(config)
    stage = None if json is None else json.values.get("zero_optimization", {}).get("stage", 0)
    check_compute(config, stage)
    check_int8(config, world)
    plan = plan_batch(config.batch_size, config.micro_batch_size, world)
    if json is not None:
        faults = list(known_faults(json.complete(config, plan), installed()))
        if faults:
            raise ValueError(f"{config.deepspeed_config}: {faults[0]}")
    return config, json, plan
