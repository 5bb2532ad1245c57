"""The state of an optimizer: in and out as a ``state_dict``, in a pickle, and where other tools look for it."""

from __future__ import annotations

import logging
import re
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import rank_of, run_together
from ..sharding import fsdp1
from ..state import parameter_state
from ..state.slots import Slot, copied
from ..step.failing import Failures
from ..step.nonfinite import NonFiniteGuard
from ..step.plan import StepPlan
from .model_changes import Planned, Watch
from .model_ref import PresentModel
from .option_changes import OptionChanges
from .options import make_plain, validate_options
from .param_groups import Member

logger = logging.getLogger("apollo_dist")

# What a pickle or a deep copy keeps as it is; hooks and schedulers are left out, as torch does.
_KEPT = (
    "defaults", "param_groups", "seed", "exclude", "cache_projection", "_guard", "_choose", "_given", "_restored",
    "_trained", "_generation",
)  # fmt: skip


class StatefulOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose state lies in slots by matrix name, and can be shown by parameter.

    Attributes:
        state: for plain and DTensor parameters what this rank owns of each one's state, to look at; empty before the
            first step and under other layouts. Assigning to it has no effect.
    """

    seed: int
    exclude: str | None
    cache_projection: bool | str
    _process_group: dist.ProcessGroup | None
    _guard: NonFiniteGuard
    _failures: Failures
    _choose: bool
    _members: dict[int, Member]
    _given: list[Tensor]
    _slots: dict[str, Slot]
    _model: PresentModel
    # State of whole parameters that was loaded, by name, until a build takes it over.
    _pending: dict[str, dict[str, Any]]
    # Names of the parameters that a load had to bring state for; None where nothing was loaded.
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
    # Stacks of experts in ``state``, with the slot that counts their steps.
    _stacks: list[tuple[dict[str, Any], Slot]]

    def _init_state(self) -> None:
        """Set the attributes of an optimizer without state."""
        self._slots, self._pending, self._builds = {}, {}, {}
        self._trained, self._generation, self._option_changes = {}, 0, OptionChanges()
        self._idle, self._outside, self._watch, self._unreduced = [], [], None, set()
        self._updated, self._planned, self._unheld, self._bare = [], [], [], None
        self._restored, self._by_parameter, self._stacks = None, False, []

    def _begin(self, names: Iterable[str]) -> None:
        """Note that parameters have state."""
        for name in names:
            self._trained.setdefault(name, self._generation)

    def named_state(self) -> dict[str, dict[str, Any]]:
        """The state that this rank holds, by matrix or parameter name; live, in the layout of this rank."""
        return {name: dict(slot) for name, slot in self._slots.items()}

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds; 0 before the first step."""
        tensors = (t for slot in self._slots.values() for t in slot.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter, and the parameter groups; projections are no part of it, they follow from the seed.

        With plain parameters as of any torch optimizer. With DTensor parameters (FSDP2, HSDP) it is a collective and
        holds DTensors: ``torch.distributed.checkpoint`` can save it, and load it at another number of ranks
        (``get_optimizer_state_dict``, ``set_optimizer_state_dict``). Under DeepSpeed it is this rank's own, by name,
        and loads only on the same rank of the same number of ranks. Tensors may be the live ones.

        Raises:
            ValueError: under FSDP1, where neither this nor ``FSDP.optim_state_dict`` could hold all of it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        for group in self.param_groups:
            make_plain(group)
        if (self._slots or self._pending) and any(map(fsdp1.is_flattened, self._tensors())):
            raise ValueError(
                "FSDP1's optimizer state dict holds tensors in the shapes of parameters only, and would lose APOLLO's "
                "low-rank state: save with apollo_dist.checkpoint.save(folder, model, optimizer), load with "
                "apollo_dist.checkpoint.load"
            )
        found = dict(self._pending)
        for build in self._builds.values() if self._by_parameter else ():
            found |= parameter_state.collect(build)
        indices: dict[int, int] = {}
        for tensor in self._tensors(named=bool(found)):
            indices.setdefault(id(tensor), len(indices))
        groups = [
            {**{key: value for key, value in group.items() if key != "params"},
             "params": [indices[id(p)] for p in group["params"]]}
            for group in self.param_groups
        ]  # fmt: skip
        state: dict[Any, dict[str, Any]] = {}
        if found or self._by_parameter:
            names = {index: self._members[key].name for key, index in indices.items()}
            state = {index: dict(found[name]) for index, name in names.items() if name in found}
            assert len(state) == len(found), "a state without a parameter"
        else:
            state.update(self.named_state())
            self._tell_of_conversion()
        result: dict[str, Any] = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def _tell_of_conversion(self) -> None:
        """Once: DeepSpeed is about to save what its converter cannot read."""
        divided = any(h.layout == "zero" for build in self._builds.values() for h, _ in build.holdings)
        if divided and not self._told and rank_of(self._process_group) == 0:
            logger.warning(
                "what DeepSpeed saves of this optimizer loads at the same number of ranks and stage only; "
                "ds_to_universal cannot convert it, since its moments do not have the shapes of parameters. To "
                "continue elsewhere save with apollo_dist.checkpoint.save(folder, engine) as well"
            )
        self._told = self._told or divided

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave, exactly. Every rank must call it.

        States keep their dtypes. They are copied, and checked at the next step.

        Raises:
            ValueError: on all ranks alike, if the parameter groups differ in number or size, or hold bad options.
        """
        given = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, given)
            given = given if changed is None else changed
        # Nothing changes on any rank before all have read it.
        groups, pending, slots = run_together(lambda: self._read(given), self._process_group)
        if self._by_parameter:
            self.state = defaultdict(dict)
        self._init_state()
        self._pending, self._slots, self.param_groups = pending, slots, groups
        self._option_changes.remember(groups)
        if pending or slots:
            self._begin([*pending, *(re.sub(r"\[\d+\]$", "", name) for name in slots)])
            # What was frozen, and has no state, starts when it trains.
            frozen = {id(p) for p in self._given if not p.requires_grad}
            self._restored = frozenset(
                m.name for key, m in self._members.items() if key not in frozen or m.name in self._trained
            )
        self._show()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Slot]]:
        """Parameter groups, state by parameter and slots out of a state dict; local."""
        saved = deepcopy(list(state_dict["param_groups"]))
        sizes, here = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if sizes != here:
            raise ValueError(
                f"the loaded state is of parameter groups with {sizes} parameters, and here they have {here}"
            )
        keys = [key for group in saved for key in group["params"]]
        by_parameter = not state_dict["state"].keys().isdisjoint(keys)
        by_key = dict(zip(keys, self._tensors(named=by_parameter), strict=True))
        for number, (group, old) in enumerate(zip(saved, self.param_groups, strict=True)):
            group["params"] = old["params"]
            # What older versions did not save; tuples come back from a checkpoint as lists.
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            make_plain(group)
            validate_options(group, f"parameter group {number} of the loaded state")
        if not by_parameter:
            return saved, {}, {name: copied(slot) for name, slot in state_dict["state"].items()}
        pending = {}
        for key, value in state_dict["state"].items():
            if key not in by_key:
                raise ValueError(f"the loaded state has {key!r}, which is in no parameter group")
            pending[self._name(by_key[key])] = copied(value)
        return saved, pending, {}

    def _tensors(self, named: bool = False) -> list[Tensor]:
        """What is in ``param_groups``; where it must be ``named``, parameters that tools have put there are known."""
        held = [p for group in self.param_groups for p in group["params"]]
        if named and self._model.module is not None and any(id(p) not in self._members for p in held):
            self._follow()
            held = [p for group in self.param_groups for p in group["params"]]
        return held

    def _follow(self, strict: bool = False) -> None:
        raise NotImplementedError

    def _name(self, tensor: Tensor) -> str:
        if id(tensor) not in self._members:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is not one that the optimizer was built with: state of "
                "whole parameters cannot be loaded here"
            )
        return self._members[id(tensor)].name

    def _slot(self, name: str) -> Slot:
        """The state of a matrix or tensor, for a build; empty if it is new."""
        if self._restored is not None and not self._pending and name not in self._slots and not self._is_new(name):
            raise ValueError(f"the loaded state has nothing for {name}; it is from another model or other groups")
        return self._slots.setdefault(name, {})

    def _is_new(self, name: str) -> bool:
        """Whether a matrix came after the state was loaded, with ``add_param_group``."""
        new = {m.name for m in self._members.values()} - (self._restored or frozenset())
        return any(name == one or name.startswith(f"{one}[") for one in new)

    def _adopt(self, build: StepPlan, by_parameter: bool) -> None:
        """Give a new build the state that was loaded, if there is one. A collective.

        Args:
            build: not yet one of ``_builds``.
            by_parameter: whether ``param_groups`` holds the parameters, and not what DeepSpeed puts in their place.

        Raises:
            ValueError: on all ranks alike, if the state does not fit.
        """
        self._by_parameter = by_parameter and parameter_state.by_parameter(build)
        if not self._pending:
            return
        if not self._by_parameter:
            raise ValueError(
                "the loaded state is that of whole or DTensor parameters, which this layout cannot take over; use "
                "apollo_dist.checkpoint to continue under another engine"
            )
        required = {name for name in self._restored or () if not self._is_frozen(name)}
        parameter_state.restore(build, self._pending, required, self._process_group)
        for holding, _ in build.holdings:
            self._pending.pop(holding.name, None)

    def _is_frozen(self, name: str) -> bool:
        return any(m.name == name and not p.requires_grad for p in self._given if (m := self._members.get(id(p))))

    def _show(self) -> None:
        """Fill ``state`` for other tools to look at; under DeepSpeed it is left to that."""
        if not (self._pending or self._by_parameter):
            return
        shown = {p: self._pending.get(self._name(p)) for p in self._tensors()} if self._pending else {}
        self.state = defaultdict(dict, {p: state for p, state in shown.items() if state is not None})
        self._stacks = []
        for build in self._builds.values():
            for tensor, state, counter in parameter_state.show(build):
                self.state[tensor] = state
                if counter is not None:
                    self._stacks.append((state, counter))

    def _count_stacks(self) -> None:
        for shown, counter in self._stacks:
            shown["step"] = counter["step"]

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise ValueError("an optimizer with a process_group cannot be pickled or copied: use state_dict()")
        kept = {key: self.__dict__[key] for key in _KEPT}
        kept["slots"] = {name: copied(slot) for name, slot in self._slots.items()}
        kept["members"] = [self._members[id(p)] for p in self._given]
        return {**kept, "pending": self._pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        slots, members, pending = (state.pop(key) for key in ("slots", "members", "pending"))
        self._process_group, self._engine, self._driver, self._constructed = None, None, None, True
        self._frozen_once = set()
        self._failures = Failures(None)
        self._model = PresentModel(None)
        self._init_state()
        super().__setstate__({**state, "state": defaultdict(dict)})
        self.defaults.pop("differentiable", None)  # which torch adds
        self._members = {id(p): m for p, m in zip(self._given, members, strict=True)}
        self._slots, self._pending = slots, pending
        if slots:
            self._restored = frozenset(m.name for m in members)
        self._show()


def given_twice(tensors: Iterable[tuple[str, Tensor]], known: Mapping[int, Member]) -> None:
    """Raise ValueError if a tensor comes twice, or is known already: it would be updated twice in a step."""
    names = {key: m.name for key, m in known.items()}
    for name, tensor in tensors:
        if id(tensor) in names:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is given twice, before as {names[id(tensor)]}: some parameters "
                "appear in more than one parameter group, or twice in one. Pass each once"
            )
        names[id(tensor)] = name
