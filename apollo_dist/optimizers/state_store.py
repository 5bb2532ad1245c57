"""The state of an optimizer: in slots by matrix name, in and out by parameter, and where other tools look for it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import rank_of
from ..rules.groups import SELECT_BY_NAME, options_of
from ..rules.registry import rules_of
from ..sharding import fsdp1
from ..state import parameter_state
from ..state.callers import called_to_load_into
from ..state.identity import NAMES, identify
from ..state.loaded import Loaded, Target, read
from ..state.slots import STEP, Slot, copied, step_tensor
from .options import make_plain, validate_options
from .targets import targets

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..step.plan import StepPlan
    from .members import Members

logger = logging.getLogger("apollo_dist")

Group = dict[str, Any]


class StateStore:
    """What an optimizer keeps for its parameters.

    Args:
        rules: of groups that name none.
        members: the parameters.
        process_group: of the ranks that train them.

    Attributes:
        slots: the state that lies here, by the name of a matrix or parameter.
        pending: state of whole parameters that was loaded, by name, until a plan takes it over.
        trained: names of the parameters that have state, on whichever rank, each with the plan in which it began.
        generation: the number of plans that were made.
        restored: names of the parameters when slots were loaded, which must have brought state for them; None where
            none were.
        by_parameter: whether state can be shown by parameter.
        accepted: what the next load may bring otherwise: "seed", "names", "projections".
        stale: whether steps were taken since ``shown`` was looked at.
    """

    def __init__(self, rules: Rules, members: Members, process_group: dist.ProcessGroup | None) -> None:
        self._rules, self._members, self._group = rules, members, process_group
        self.accepted: frozenset[str] = frozenset()
        self._shown: defaultdict[Any, Any] = defaultdict(dict)
        # Whether it was said that DeepSpeed's checkpoints cannot be converted.
        self._told = False
        self.clear()

    def clear(self) -> None:
        """Forget all state."""
        self.slots: dict[str, Slot] = {}
        self.pending: dict[str, dict[str, Any]] = {}
        self.trained: dict[str, int] = {}
        self.generation = 0
        self.restored: frozenset[str] | None = None
        self.by_parameter = False
        # What is shown, each with the slot that counts its steps.
        self._counted: list[tuple[dict[str, Any], Slot]] = []
        self.stale = False

    # ---- what is there --------------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes of the state that lies here."""
        tensors = (t for slot in self.slots.values() for t in slot.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def begin(self, names: Iterable[str]) -> None:
        """Note that parameters have state."""
        for name in names:
            self.trained.setdefault(name, self.generation)

    def has_state(self, group: Mapping[str, Any]) -> bool:
        """Whether any parameter of a group has state; what DeepSpeed puts in their places does from the first step."""
        infos = self._members.infos
        names = (infos[id(p)].name if id(p) in infos else None for p in group["params"])
        return any(name in self.trained if name is not None else bool(self.trained) for name in names)

    def slot_source(self) -> Callable[[str], Slot]:
        """What gives a plan the state of a matrix or tensor by its name; empty if it is new."""
        added = set(self._members.names().values()) - (self.restored or frozenset())

        def slot(name: str) -> Slot:
            if self.restored is not None and name not in self.slots and not added.intersection((name, _stack(name))):
                raise ValueError(
                    f"the loaded state has nothing for {name}; it is from another model or other groups, or from "
                    "another rank or number of ranks"
                )
            return self.slots.setdefault(name, {})

        return slot

    def adopt(self, built: StepPlan, by_parameter: bool) -> None:
        """Give a new plan the state that was loaded, if there is one. A collective.

        Args:
            built: whose slots are to get it.
            by_parameter: whether groups hold the parameters, and not what DeepSpeed puts in their place.

        Raises:
            ValueError: on all ranks alike, if the state does not fit.
        """
        self.by_parameter = by_parameter and parameter_state.by_parameter(built)
        if not self.pending:
            return
        if not self.by_parameter:
            raise ValueError(
                "the loaded state is that of whole or DTensor parameters, which this layout cannot take over; use "
                "apollo_dist.checkpoint to continue under another engine"
            )
        parameter_state.restore(built, self.pending, self._group)
        for shard, _ in built.shards:
            self.pending.pop(shard.name, None)

    # ---- where other tools look for it ----------------------------------------------------------------------------

    @property
    def shown(self) -> defaultdict[Any, Any]:
        """The ``state`` of the optimizer; after steps with their numbers of now."""
        if self.stale:
            self.stale = False
            for shown, slot in self._counted:
                shown[STEP] = step_tensor(slot[STEP])
        return self._shown

    @shown.setter
    def shown(self, value: defaultdict[Any, Any]) -> None:
        self._shown = value

    def foreign(self) -> dict[Any, Any]:
        """What others have put into ``state`` under keys that are no parameters."""
        return {key: value for key, value in self._shown.items() if not isinstance(key, Tensor)}

    def show(self, plans: Iterable[StepPlan], held: Iterable[Tensor]) -> None:
        """Fill what is shown; under DeepSpeed it is left to that.

        Args:
            plans: of the steps.
            held: what is in the groups.
        """
        self._counted = []
        if not (self.pending or self.by_parameter):
            return
        view = self.foreign()
        waiting = {p: self.pending.get(self._members.name(p)) for p in held} if self.pending else {}
        view.update({p: state for p, state in waiting.items() if state is not None})
        for built in plans:
            for tensor, state, slot in parameter_state.show(built):
                view[tensor] = state
                self._counted.append((state, slot))
        self._shown = defaultdict(dict, view)

    # ---- out ------------------------------------------------------------------------------------------------------

    def collect(self, plans: Iterable[StepPlan]) -> dict[str, dict[str, Any]]:
        """The state by parameter, as far as it can be given so."""
        found = dict(self.pending)
        form = parameter_state.template if called_to_load_into() else parameter_state.collect
        for built in plans if self.by_parameter else ():
            found |= form(built)
        return found

    def check_saved(self, held: Iterable[Tensor]) -> None:
        """Raise ValueError under FSDP1, whose own tools would lose state."""
        if (self.slots or self.pending) and any(map(fsdp1.is_flattened, held)):
            raise ValueError(
                "FSDP1's optimizer state dict holds tensors in the shapes of parameters only, and would lose APOLLO's "
                "low-rank state: save with apollo_dist.checkpoint.save(folder, model, optimizer), load with "
                "apollo_dist.checkpoint.load"
            )

    def as_dict(
        self, groups: Sequence[Group], found: Mapping[str, dict[str, Any]], plans: Iterable[StepPlan]
    ) -> dict[str, Any]:
        """A state dict.

        Args:
            groups: of the optimizer.
            found: what ``collect`` returned.
            plans: of the steps.
        """
        indices: dict[int, int] = {}
        for group in groups:
            for p in group["params"]:
                indices.setdefault(id(p), len(indices))
        saved = [
            {**{key: value for key, value in group.items() if key != "params"},
             "params": [indices[id(p)] for p in group["params"]]}
            for group in groups
        ]  # fmt: skip
        state: dict[Any, Any] = {}
        if found or self.by_parameter:
            names = {index: self._members.infos[key].name for key, index in indices.items()}
            state = {index: dict(found[name]) for index, name in names.items() if name in found}
            assert len(state) == len(found), "a state without a parameter"
        else:
            state.update(named(self.slots))
            self._tell_of_conversion(plans)
        return {"state": state | self.foreign(), "param_groups": saved}

    def _tell_of_conversion(self, plans: Iterable[StepPlan]) -> None:
        """Once: DeepSpeed is about to save what its converter cannot read."""
        divided = any(h.layout == "zero" for built in plans for h, _ in built.shards)
        if divided and not self._told and rank_of(self._group) == 0:
            logger.warning(
                "what DeepSpeed saves of this optimizer loads at the same number of ranks and stage only; "
                "ds_to_universal cannot convert it, since its moments do not have the shapes of parameters. To "
                "continue elsewhere save with apollo_dist.checkpoint.save(folder, engine) as well"
            )
        self._told = self._told or divided

    def identify(self, groups: Sequence[Group], seed: int) -> None:
        """Write into the groups whose state they hold: the seed, and the names where parameters have some."""
        identify(groups, seed)
        if self._members.knows_all(groups):
            members = self._members.of(groups)
            if all(m.named for group in members for m in group):
                for group, held in zip(groups, members, strict=True):
                    group[NAMES] = [m.name for m in held]

    # ---- in -------------------------------------------------------------------------------------------------------

    def read(
        self, state_dict: Mapping[str, Any], groups: Sequence[Group], seed: int, model: nn.Module | None
    ) -> Loaded:
        """Read and judge a state dict; local. Nothing changes."""
        return read(
            state_dict,
            groups,
            self._targets(groups, model),
            seed=seed,
            accepted=self.accepted,
            validate=self._validate,
            decided_here=(SELECT_BY_NAME,),
            options_of=lambda group: options_of(rules_of(group, self._rules)),
        )

    def take(self, loaded: Loaded) -> None:
        """Replace all state by what was read."""
        if self.by_parameter:
            self._shown = defaultdict(dict)
        self.clear()
        self.pending, self.slots = loaded.pending, loaded.slots
        self._shown.update(loaded.foreign)
        self.begin([*loaded.pending, *map(_stack, loaded.slots)])
        if loaded.slots:
            # What was frozen, and has no state, starts when it trains.
            frozen = {id(p) for p in self._members.given if not p.requires_grad}
            self.restored = frozenset(
                m.name for key, m in self._members.infos.items() if key not in frozen or m.name in self.trained
            )

    def accept_at_load(self, what: Sequence[str]) -> None:
        """Let the next load take what differs.

        Raises:
            ValueError: for anything but "seed", "names" and "projections".
        """
        unknown = sorted(set(what) - {"seed", "names", "projections"})
        if unknown or not what:
            got = ", ".join(map(repr, what)) or "nothing"
            raise ValueError(f'accept_at_load takes "seed", "names" and "projections", got {got}')
        self.accepted = frozenset(what)

    def take_accepted(self) -> frozenset[str]:
        """What ``accept_at_load`` let the load take that begins now; the next one is compared in full again."""
        accepted, self.accepted = self.accepted, frozenset()
        return accepted

    def _validate(self, group: Group, where: str) -> None:
        """Make a loaded group's options Python's own numbers, and check them."""
        rules = rules_of(group, self._rules)
        make_plain(group, rules)
        validate_options(group, where, rules)

    def _targets(self, groups: Sequence[Group], model: nn.Module | None) -> list[list[Target]] | None:
        """The parameters that a state may be loaded for; None where an engine has put its own tensors into groups."""
        members = self._members
        if not members.knows_all(groups):
            return None
        chosen, roles = members.expected_choice(model), members.expected_roles(groups, model)
        return targets(groups, members.of(groups), self._rules, chosen, roles)

    # ---- copies ---------------------------------------------------------------------------------------------------

    def copied(self, plans: Iterable[StepPlan]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copies of the state: what is given by parameter, as far as that is known, and slots."""
        pending, slots = dict(self.pending), self.slots
        if self.by_parameter:
            # So that a copy's ``state_dict`` has torch's form from the start.
            for built in plans:
                pending |= parameter_state.collect(built)
            slots = {}
        return copied(pending), copied(slots)


def named(slots: Mapping[str, Slot]) -> dict[str, dict[str, Any]]:
    """State by the name of a matrix or parameter, in dicts of its own; the tensors are those of ``slots``."""
    return {name: dict(slot) for name, slot in slots.items()}


def _stack(name: str) -> str:
    """The parameter that a matrix ``name[index]`` is part of; the name itself for others."""
    return name.rpartition("[")[0] if name.endswith("]") else name
