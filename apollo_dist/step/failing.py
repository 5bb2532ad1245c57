"""A step that fails on one rank ends on all of them.

The first step of what was built is where most things fail: gradients have the wrong kind or place, or memory runs out.
It is taken with care: ranks meet before every collective, and no weight changes before all of them have come to the
point where nothing but the update is left. If a rank fails before that, the states are made new again and the step can
be repeated. Later steps cost no communication: a rank that fails raises an alarm, which ends the waiting of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..distributed import meet, raised_together, together
from .elementwise import ElementwiseTensor, step_elementwise
from .run import begin_step, finish_step, step_shard_group

if TYPE_CHECKING:
    from ..state.slots import Slot
    from .failures import Failures
    from .shard_group import ShardGroupStep


class Steps:
    """The steps of some shard groups and other tensors, which end on all ranks if they fail on one.

    Args:
        shard_groups, elementwise: what is stepped.
        failures: of the optimizer.

    Attributes:
        taken: whether a step was taken.
    """

    def __init__(
        self, shard_groups: Sequence[ShardGroupStep], elementwise: Sequence[ElementwiseTensor], failures: Failures
    ) -> None:
        self._shard_groups, self._elementwise, self._failures = list(shard_groups), list(elementwise), failures
        self.taken = False

    def take(self, seed: int, skip: Callable[[], bool] = lambda: False) -> None:
        """One step; every rank of the optimizer's group must take it.

        Args:
            seed: of the projections, and of stochastic rounding.
            skip: asks, on all ranks, whether this step is to be skipped.

        Raises:
            RankError: if another rank failed; that rank raises its own error.
        """
        if not self.taken:
            self._take_first(seed, skip)
            return
        failures = self._failures
        failures.check()
        try:
            with failures.alarm.armed():
                if not skip():
                    for group_step in self._shard_groups:
                        step_shard_group(group_step, seed)
                    step_elementwise(self._elementwise, seed)
        except BaseException as error:
            if not raised_together(error, failures.group):
                failures.half_way(error)
            raise

    def _take_first(self, seed: int, skip: Callable[[], bool]) -> None:
        new = all(int(slot["step"]) == 0 for slot in self._slots())
        phase = "before"
        try:
            with together(self._failures.group):
                self._failures.check()
                if skip():
                    return
                phase = "states"
                pending = [begin_step(group_step, seed) for group_step in self._shard_groups]
                meet()
                phase = "weights"
                for group_step, one in zip(self._shard_groups, pending, strict=True):
                    finish_step(group_step, one)
                step_elementwise(self._elementwise, seed)
        except BaseException as error:
            if phase == "states" and new:
                self._forget()
            elif phase != "before":
                self._failures.half_way(error)
            raise
        self._failures.alarm  # noqa: B018  # made here, where all ranks are
        self.taken = True

    def _slots(self) -> list[Slot]:
        return [m.state for one in self._shard_groups for m in one.matrices] + [t.state for t in self._elementwise]

    def _forget(self) -> None:
        """Make the states what they were before the first step."""
        for slot in self._slots():
            for key, value in slot.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    slot[key] = 0
