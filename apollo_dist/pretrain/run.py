"""The state of a training run on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apollo_dist.pretrain.watchdog import SLOW, Watchdog

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.checkpoint import Checkpoints
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.data import Data
    from apollo_dist.pretrain.distributed import Ranks
    from apollo_dist.pretrain.engines import Engine
    from apollo_dist.pretrain.evaluate import Evaluation
    from apollo_dist.pretrain.metrics import Metrics
    from apollo_dist.pretrain.stop import Requests


@dataclass
class Run:
    """Everything that training needs, set up and equal on all ranks."""

    config: Config
    plan: BatchPlan
    data: Data
    engine: Engine
    checkpoints: Checkpoints
    metrics: Metrics
    ranks: Ranks
    step: int  # steps done
    optimizer_name: str
    requests: Requests
    watchdog: Watchdog
    peak_flops: float | None = None  # of a device, where it is known
    skipped: int = 0  # steps left out in a row
    validated: Evaluation | None = None
    validated_step: int = 0  # 0: not yet

    def go_on(self) -> bool:
        """Whether the ranks have agreed, now, not to stop; collective. Steps agree without a call of this."""
        self.requests.agree(self.ranks.sum(self.requests.counts()))
        return not self.requests.stop

    def save(self) -> None:
        """Write a checkpoint of this step, or begin to, unless there is one; collective."""
        if self.checkpoints.step != self.step:
            self.watchdog.mark(f"the checkpoint after step {self.step}", SLOW)
            self.metrics.sync()
            self.checkpoints.save(self.step, self.engine, self.data)
        self.requests.saved()
