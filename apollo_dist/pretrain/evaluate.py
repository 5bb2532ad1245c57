"""Validation: the exact mean over all validation tokens, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from apollo_dist.pretrain.data.packed import Windows
    from apollo_dist.pretrain.distributed import Ranks
    from apollo_dist.pretrain.engines.base import Engine

CHECK_EVERY = 8  # forward passes between two questions whether to go on


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood over ``tokens`` predicted tokens, in nats."""

    loss: float
    tokens: int
    bytes_per_token: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """loss / ln 2 / bytes per token; None where the text is not known."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token


def spread(available: int, wanted: int | None) -> list[int]:
    """Indices of ``wanted`` evenly spaced windows of ``available`` (all if None or too many), ascending."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [k * available // wanted for k in range(wanted)]


@torch.no_grad()
def evaluate(
    engine: Engine,
    windows: Windows,
    micro: int,
    ranks: Ranks,
    sequences: int | None,
    bytes_per_token: float | None,
    go_on: Callable[[], bool] = lambda: True,
) -> Evaluation | None:
    """Evaluate on ``sequences`` windows (all if None), ``micro`` at a time; collective.

    Window j goes to rank ``j % world``. Sums and counts travel, not means, so an uneven split does not matter; every
    rank makes the same number of forward passes, since those of FSDP and ZeRO-3 are collectives: where a rank has no
    window left it repeats its first batch, or window 0, with weight zero.

    Before the first pass and every few ones ``go_on`` is asked, a collective; where it says no, the evaluation is given
    up and None returned.

    Raises SetupError on every rank where one could not read its windows.
    """
    chosen = spread(len(windows), sequences)
    mine = chosen[ranks.rank :: ranks.world]
    passes = math.ceil(math.ceil(len(chosen) / ranks.world) / micro)
    total = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # losses, tokens, batches that could not be read
    problem: Exception | None = None
    engine.train(False)
    for number, start in enumerate(range(0, passes * micro, micro)):
        if number % CHECK_EVERY == 0 and not go_on():
            engine.train(True)
            return None
        batch = mine[start : start + micro]
        try:
            tokens = windows.batch(batch or mine[:micro] or chosen[:1]).to(ranks.device)
        except Exception as error:  # whatever it is, the other ranks must hear of it, and their passes need this one's
            problem = error
            total[2] += 1
            tokens = torch.zeros(1, windows.length + 1, dtype=torch.int64, device=ranks.device)
        losses = engine.losses(tokens[:, :-1], tokens[:, 1:])
        if batch:
            total[0] += losses.sum(dtype=torch.float64)
            total[1] += losses.numel()
    engine.train(True)
    nll, count, failed = ranks.sum(total)
    if failed:
        ranks.share(problem)
    return Evaluation(nll / count, int(count), bytes_per_token)
