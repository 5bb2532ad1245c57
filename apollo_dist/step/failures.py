"""What the ranks of one optimizer know about failed steps."""

from __future__ import annotations

import torch.distributed as dist

from ..distributed import RankError, described, world_of
from ..exchange.waiting import Alarm


class Failures:
    """What the ranks of one optimizer know about failed steps.

    Args:
        group: the ranks that step together, default all.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._alarm: Alarm | None = None
        self._broken: str | None = None

    @property
    def alarm(self) -> Alarm:
        """The alarm of later steps; made when all ranks ask for it at the same point."""
        if self._alarm is None:
            self._alarm = Alarm(self.group)
        return self._alarm

    def check(self) -> None:
        """Raise RuntimeError if an earlier step failed half way, so that ranks may hold different weights."""
        if self._broken is not None:
            raise RuntimeError(
                f"an earlier step failed half way ({self._broken}), so the weights and states of the ranks may not "
                "belong together: end this job, and continue from a checkpoint"
            )

    def half_way(self, error: BaseException) -> None:
        """Note that a step failed half way; in a single process it changes nothing, as in torch's optimizers."""
        if world_of(self.group) > 1 and self._broken is None:
            self._broken = str(error) if isinstance(error, RankError) else described(error)
