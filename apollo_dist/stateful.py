"""The state of an optimizer: in and out as a ``state_dict``, in a pickle, and where other tools look for it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from . import parameter_state
from .agreement import run_together
from .build import Build
from .groups import Member, validate_options
from .nonfinite import NonFiniteGuard
from .unit import Slot

# What a pickle or a deep copy keeps as it is; hooks and schedulers are left out, as torch does.
_KEPT = ("defaults", "param_groups", "seed", "exclude", "cache_projection", "_guard", "_choose", "_given", "_restored")


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
    _choose: bool
    _members: dict[int, Member]
    _given: list[Tensor]
    _slots: dict[str, Slot]
    # State by parameter that was loaded, by the id of the parameter, until a build takes it over.
    _pending: dict[int, dict[str, Any]]
    # Ids of the parameters that a load had to bring state for; None where nothing was loaded.
    _restored: list[Tensor] | None
    _builds: dict[tuple[Any, ...], Build]
    _by_parameter: bool
    _engine: Any
    _constructed: bool
    # Stacks of experts in ``state``, with the slot that counts their steps.
    _stacks: list[tuple[dict[str, Any], Slot]]

    def _init_state(self) -> None:
        """Set the attributes of an optimizer without state."""
        self._slots, self._pending, self._builds = {}, {}, {}
        self._restored, self._by_parameter, self._stacks = None, False, []

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
        if (self._slots or self._pending) and any(getattr(p, "_fsdp_flattened", False) for p in self._given):
            raise ValueError(
                "FSDP1's optimizer state dict holds tensors in the shapes of parameters only, and would lose APOLLO's "
                "low-rank state: save with apollo_dist.checkpoint.save(folder, model, optimizer), load with "
                "apollo_dist.checkpoint.load"
            )
        indices: dict[int, int] = {}
        for tensor in chain.from_iterable(group["params"] for group in self.param_groups):
            indices.setdefault(id(tensor), len(indices))
        groups = [
            {**{key: value for key, value in group.items() if key != "params"},
             "params": [indices[id(p)] for p in group["params"]]}
            for group in self.param_groups
        ]  # fmt: skip
        state: dict[Any, dict[str, Any]] = {}
        if self._by_parameter or self._pending:
            found = dict(self._pending)
            for build in self._builds.values():
                found |= {id(tensor): one for tensor, one in parameter_state.collect(build)}
            state.update((index, dict(found[key])) for key, index in indices.items() if key in found)
        else:
            state.update(self.named_state())
        result: dict[str, Any] = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

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
        run_together(lambda: self._load(given), self._process_group)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        """The local part of ``load_state_dict``."""
        saved = deepcopy(list(state_dict["param_groups"]))
        sizes, here = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if sizes != here:
            raise ValueError(
                f"the loaded state is of parameter groups with {sizes} parameters, and here they have {here}"
            )
        keys = chain.from_iterable(group["params"] for group in saved)
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        by_key = dict(zip(keys, tensors, strict=True))
        for number, (group, old) in enumerate(zip(saved, self.param_groups, strict=True)):
            group["params"] = old["params"]
            # What older versions did not save; tuples come back from a checkpoint as lists.
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            group["betas"] = tuple(group["betas"])
            validate_options(group, f"parameter group {number} of the loaded state")
        self._init_state()
        for key, value in state_dict["state"].items():
            if key in by_key:
                self._pending[id(by_key[key])] = _copy(value)
            else:
                self._slots[key] = _copy(value)
        if self._pending and self._slots:
            raise ValueError(f"the loaded state has {next(iter(self._slots))!r}, which is in no parameter group")
        if state_dict["state"]:
            self._restored = list(self._given)
        self.param_groups = saved
        self.state = defaultdict(dict, {t: self._pending[id(t)] for t in tensors if id(t) in self._pending})

    def _slot(self, name: str) -> Slot:
        """The state of a matrix or tensor, for a build; empty if it is new."""
        if self._restored is not None and not self._pending and name not in self._slots and not self._is_new(name):
            raise ValueError(f"the loaded state has nothing for {name}; it is from another model or other groups")
        return self._slots.setdefault(name, {})

    def _is_new(self, name: str) -> bool:
        """Whether a matrix came after the state was loaded, with ``add_param_group``."""
        known = {id(p) for p in self._restored or ()}
        new = [m.name for key, m in self._members.items() if key not in known]
        return any(name == one or name.startswith(f"{one}[") for one in new)

    def _adopt(self, build: Build, by_parameter: bool) -> None:
        """Take over a new build: give it the state that was loaded, and show its state. A collective."""
        self._by_parameter = by_parameter and parameter_state.by_parameter(build)
        if not self._by_parameter:
            if self._pending:
                raise ValueError(
                    "the loaded state is that of whole or DTensor parameters, which this layout cannot take over; use "
                    "apollo_dist.checkpoint to continue under another engine"
                )
            return
        if self._pending:
            required = {id(p) for p in self._restored or () if p.requires_grad}
            parameter_state.restore(build, self._pending, required, self._process_group)
            for tensor in build.tensors:
                self._pending.pop(id(tensor), None)
        self.state = defaultdict(dict, {t: s for t, s in self.state.items() if id(t) in self._pending})
        self._stacks = []
        for one in (*self._builds.values(), build):
            for tensor, shown, counter in parameter_state.show(one):
                self.state[tensor] = shown
                if counter is not None:
                    self._stacks.append((shown, counter))

    def _count_stacks(self) -> None:
        for shown, counter in self._stacks:
            shown["step"] = counter["step"]

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise ValueError("an optimizer with a process_group cannot be pickled or copied: use state_dict()")
        kept = {key: self.__dict__[key] for key in _KEPT}
        kept["slots"] = {name: _copy(slot) for name, slot in self._slots.items()}
        kept["members"] = [self._members[id(p)] for p in self._given]
        kept["pending"] = [self._pending.get(id(p)) for p in self._given]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        slots, members, pending = (state.pop(key) for key in ("slots", "members", "pending"))
        self._process_group = None
        self._init_state()
        self._engine, self._constructed = None, True
        super().__setstate__({**state, "state": defaultdict(dict)})
        self.defaults.pop("differentiable", None)  # which torch adds
        self._slots = slots
        self._members = {id(p): m for p, m in zip(self._given, members, strict=True)}
        self._pending = {id(p): one for p, one in zip(self._given, pending, strict=True) if one is not None}
        if slots or self._pending:
            self._restored = list(self._given)


def _copy(value: Any) -> Any:
    """A copy of a state that shares no memory with it, and holds no more than its own elements."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {key: _copy(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def called_to_make_state() -> bool:
    """Whether ``step()`` was called only so that state is made: DCP does so, with gradients of zero and lr 0.

    There is no other sign of it: a schedule may start at lr 0, and a first gradient may be zero.
    """
    module: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    made_by = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    frame = sys._getframe(1) if made_by is not None else None
    while frame is not None:
        if frame.f_code is made_by:
            return True
        frame = frame.f_back
    return False


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
