"""DistributedDataParallel: whole weights and whole optimizer state on every rank."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apollo_dist.pretrain.engines.native import NativeEngine
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.placing import place_whole

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks


class DDP(NativeEngine):
    """``precision: bf16`` is autocast over fp32 weights and gradients.

    Gradients are views of the buckets in which they are reduced, so they exist once. The graph is
    declared static, which lets DDP skip its search for unused parameters, where each step has one backward pass: DDP
    cannot leave out the reduction of a static graph's first pass.
    """

    def __init__(self, config: Config, plan: BatchPlan, model: nn.Module, ranks: Ranks) -> None:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        initial = InitialWeights.of(config, model)
        placed = ranks.together(lambda: place_whole(model, initial, ranks.device))  # one rank alone may lack memory
        # All ranks have made the same weights; DDP's first broadcast would only copy them.
        self._ddp = DistributedDataParallel(
            placed,
            device_ids=ids,
            init_sync=False,
            gradient_as_bucket_view=True,
            static_graph=plan.accumulation == 1,
        )
        super().__init__(config, plan, self._ddp, ranks)
        self._autocast = config.precision == "bf16"

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        # DDP decides in the forward pass whether this backward pass reduces, so no_sync has to cover both.
        return contextlib.nullcontext() if last else self._ddp.no_sync()
