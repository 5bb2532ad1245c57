"""Copies and pickles of an optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from ..state import parameter_state
from ..state.identity import check_projections
from ..state.slots import copied
from ..step.failures import Failures
from .attributes import OptimizerAttributes
from .model_ref import ModelRef

# What a pickle or a deep copy keeps as it is; hooks and schedulers are left out, as torch does.
_KEPT = (
    "defaults", "param_groups", "seed", "exclude", "cache_projection", "kernels", "_guard", "_choose", "_choice",
    "_roles", "_from_model", "_given", "_restored", "_trained", "_generation",
)  # fmt: skip


class PicklableOptimizer(OptimizerAttributes):
    """Copies and pickles, of the optimizer alone or together with its model."""

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise ValueError("an optimizer with a process_group cannot be pickled or copied: use state_dict()")
        kept = {key: self.__dict__[key] for key in _KEPT}
        # By parameter where that is known, so that a copy's ``state_dict`` has torch's form from the start.
        pending, slots = dict(self._pending), self._slots
        if self._by_parameter:
            for build in self._builds.values():
                pending |= parameter_state.collect(build)
            slots = {}
        kept |= {"pending": copied(pending), "slots": copied(slots)}
        kept["members"] = [self._members[id(p)] for p in self._given]
        kept["foreign"] = {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if state["slots"] or state["pending"]:
            check_projections(state["param_groups"])
        slots, members, pending, foreign = (state.pop(key) for key in ("slots", "members", "pending", "foreign"))
        self._process_group, self._engine, self._driver, self._constructed = None, None, None, True
        self._frozen_once = set()
        self._failures = Failures(None)
        self._model = ModelRef(None)
        self._init_state()
        self.state = defaultdict(dict, foreign)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch adds
        self._members = {id(p): m for p, m in zip(self._given, members, strict=True)}
        self._slots, self._pending = slots, pending
        self._show()
