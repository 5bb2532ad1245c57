"""What an optimizer keeps from one step to the next.

``base.py`` puts an optimizer together of these attributes and of methods for one question each, which know each other
only through what is declared here: its groups (``grouped.py``), the model that trains them (``following.py``), its
state (``stateful.py``), copies and pickles (``picklable.py``).
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .option_changes import OptionChanges

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..rules.roles import Role
    from ..selection.kept import KeptChoice
    from ..selection.roles import KeptRoles
    from ..sharding.parameters import ParamInfo
    from ..state.slots import Slot
    from ..step.failures import Failures
    from ..step.nonfinite import NonFiniteGuard
    from ..step.plan import StepPlan
    from .model_changes import Planned, Watch
    from .model_ref import ModelRef


class OptimizerAttributes(Optimizer):
    """The attributes of an optimizer, and which of its methods the others call."""

    seed: int
    rules: Rules
    exclude: str | None
    cache_projection: bool | str
    kernels: str
    _process_group: dist.ProcessGroup | None
    _guard: NonFiniteGuard
    _failures: Failures
    _choose: bool
    _choice: KeptChoice
    _roles: KeptRoles
    _from_model: bool
    _members: dict[int, ParamInfo]
    _given: list[Tensor]
    _slots: dict[str, Slot]
    _model: ModelRef
    # State of whole parameters that was loaded, by name, until a build takes it over.
    _pending: dict[str, dict[str, Any]]
    # Names of the parameters when slots were loaded, which must have brought state for them; None where none were.
    _restored: frozenset[str] | None
    _builds: dict[tuple[Any, ...], StepPlan]
    # Names of the parameters that have state, on whichever rank, each with the plan in which it began.
    _trained: dict[str, int]
    _generation: int
    _option_changes: OptionChanges
    # Parameters that are frozen and have no state; and those that DeepSpeed does not update, with names.
    _idle: list[Tensor]
    _outside: list[tuple[str, Tensor]]
    # The model's parameters that DeepSpeed updates; and without it those that train.
    _updated: list[tuple[str, Tensor]]
    _planned: list[Planned]
    # Frozen parameters of the model that are in no group.
    _unheld: list[tuple[str, Tensor]]
    # By their names in the model that was found for them, parameters that came without one; None before a look.
    _bare: dict[str, Tensor] | None
    _watch: Watch | None
    # Names of parameters that were frozen once, while ranks have not compared their gradients.
    _frozen_once: set[str]
    _unreduced: set[str]
    _by_parameter: bool
    _engine: Any
    _driver: weakref.ref[Any] | None
    _constructed: bool
    # Whether it was said that DeepSpeed's checkpoints cannot be converted.
    _told: bool = False
    # What ``state`` shows, each with the slot that counts its steps; ``_stale`` after a step.
    _view: defaultdict[Any, Any]
    _counted: list[tuple[dict[str, Any], Slot]]
    _stale: bool
    # What the next load may bring otherwise: "seed", "names", "projections".
    _accepted: frozenset[str]

    def _init_state(self) -> None:
        """Set the attributes of an optimizer without state."""
        self._slots, self._pending, self._builds = {}, {}, {}
        self._trained, self._generation, self._option_changes = {}, 0, OptionChanges(self.rules)
        self._idle, self._outside, self._watch, self._unreduced = [], [], None, set()
        self._updated, self._planned, self._unheld, self._bare = [], [], [], None
        self._restored, self._by_parameter = None, False
        self._counted, self._stale = [], False

    def _begin(self, names: Iterable[str]) -> None:
        """Note that parameters have state."""
        for name in names:
            self._trained.setdefault(name, self._generation)

    def _expected_roles(self) -> Mapping[str, Role]:
        raise NotImplementedError

    def _expected_choice(self) -> Mapping[str, bool]:
        raise NotImplementedError

    def _follow(self, strict: bool = False) -> None:
        raise NotImplementedError

    def _identify(self) -> None:
        """Write into the groups whose state they hold: the seed, and the names where parameters have some."""
        raise NotImplementedError

    def _show(self) -> None:
        """Fill ``state`` for other tools to look at; under DeepSpeed it is left to that."""
        raise NotImplementedError
