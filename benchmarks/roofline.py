"""Tokens a second of one of eight A100s by a roofline model: an upper bound, from data sheets, and not a measurement.

A pass over a micro-batch takes its FLOPs at the peak, or three reads of the weights if they take longer; then gradients
are added to those there are (two reads, a write). A step adds a ring all-reduce of the gradients and the optimizer's
reads and writes. Nothing overlaps. Data sheet: NVIDIA A100-80GB SXM.
"""

from __future__ import annotations

from dataclasses import dataclass

from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.model import deferred_model
from apollo_dist.pretrain.utilization import flops_per_token

WORLD = 8
# Dense bf16 FLOPs/s, bytes/s of memory, bytes/s of NVLink in one direction.
PEAK, BANDWIDTH, LINK = 312e12, 2039e9, 300e9


@dataclass(frozen=True)
class Roofline:
    """One rank's step in seconds.

    Attributes:
        micro: sequences of a micro-batch.
        length: tokens of a sequence.
        one_pass: seconds of the passes over a micro-batch.
        reduce: of the gradients' reduction.
        update: of the optimizer's step.
    """

    micro: int
    length: int
    one_pass: float
    reduce: float
    update: float

    @classmethod
    def of(cls, config: Config, micro: int, state_bytes: int) -> Roofline:
        """Of a run in bf16 under DDP, whose optimizer keeps ``state_bytes``, which it reads and writes."""
        model, length = config.model, config.sequence_length
        weights = 2 * sum(p.numel() for p in deferred_model(model, length).parameters())
        flops = flops_per_token(model, length) * micro * length
        # Weights and gradients are read, weights written; APOLLO reads the gradient twice.
        traffic = (3 if config.optimizer.name == "adamw" else 4) * weights + 2 * state_bytes
        return cls(
            micro,
            length,
            max(flops / PEAK, 3 * weights / BANDWIDTH) + 3 * weights / BANDWIDTH,
            ring_bytes(weights) / LINK,
            traffic / BANDWIDTH,
        )

    def tokens_per_s(self, passes: int) -> float:
        """Tokens a second where a step has so many micro-batches."""
        return passes * self.micro * self.length / (passes * self.one_pass + self.reduce + self.update)

    def reduction_for(self, ratio: float, other: Roofline) -> float | None:
        """Seconds of the reduction with which this is ``ratio`` times as fast as ``other``; None where none does.

        Steps have one micro-batch each.
        """
        gained = self.micro - ratio * other.micro
        if gained <= 0:
            return None
        lost = ratio * other.micro * (self.one_pass + self.update) - self.micro * (other.one_pass + other.update)
        return max(0.0, lost / gained)


def ring_bytes(gradients: int) -> float:
    """Bytes that leave a rank when gradients of so many bytes are summed over a ring."""
    return 2 * (WORLD - 1) / WORLD * gradients
