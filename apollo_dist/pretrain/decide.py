"""What a run will be, from its settings and the number of ranks: checked before anything is built."""

from __future__ import annotations

from apollo_dist.pretrain.batching import BatchPlan, plan_batch
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.engines.deepspeed_json import DeepSpeedJson, reconcile
from apollo_dist.pretrain.metrics import check_loggers
from apollo_dist.pretrain.settings import Settings


def decide(settings: Settings, world: int) -> tuple[Config, DeepSpeedJson | None, BatchPlan]:
    """The configuration with the values of DeepSpeed's JSON, that JSON if there is one, and how a step is divided.

    Raises ValueError where they contradict each other, or batches do not divide by ``world`` ranks.
    """
    config, json = reconcile(settings, world)
    check_loggers(config)
    return config, json, plan_batch(config.batch_size, config.micro_batch_size, world)
