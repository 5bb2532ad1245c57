"""The state of an optimizer: in and out as a ``state_dict``, in a pickle, and where other tools look for it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..distributed import check_same_on_all_ranks, rank_of, run_together
from ..rules.groups import SELECT_BY_NAME, options_of
from ..rules.registry import rules_of
from ..sharding import fsdp1
from ..state import parameter_state
from ..state.callers import called_to_load_into
from ..state.identity import NAMES, identify
from ..state.loaded import Loaded, Target, read, tell
from ..state.slots import STEP, Slot, step_tensor
from .attributes import OptimizerAttributes
from .options import make_plain, validate_options
from .targets import targets

if TYPE_CHECKING:
    from ..sharding.parameters import ParamInfo
    from ..step.plan import StepPlan

logger = logging.getLogger("apollo_dist")


class StatefulOptimizer(OptimizerAttributes):
    """State that lies in slots by matrix name, and can be shown by parameter."""

    def named_state(self) -> dict[str, dict[str, Any]]:
        """The state that this rank holds, by matrix or parameter name; live, in the layout of this rank."""
        return {name: dict(slot) for name, slot in self._slots.items()}

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds; 0 before the first step."""
        tensors = (t for slot in self._slots.values() for t in slot.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any torch optimizer; the group says whose state it will hold."""
        super().add_param_group(param_group)
        identify(self.param_groups, self.seed)

    @property
    def state(self) -> defaultdict[Any, Any]:
        """What this rank has of each parameter's state, as ``state_dict`` gives it; live, to look at.

        Empty before the first step and under layouts other than plain and DTensor parameters. Of experts the values
        are lists by matrix. Keys that are no parameters are the caller's own, and travel in ``state_dict``.
        """
        if self._stale:
            self._stale = False
            for shown, slot in self._counted:
                shown[STEP] = step_tensor(slot[STEP])
        return self._view

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        self._view = value

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter, and the parameter groups; projections are no part of it, they follow from the seed.

        Local, as of any torch optimizer: nothing is communicated, and one rank alone may call it. Tensors may be the
        live ones. With DTensor parameters (FSDP2, HSDP) it holds DTensors: ``torch.distributed.checkpoint`` can save
        it, and load it at another number of ranks (``get_optimizer_state_dict``, ``set_optimizer_state_dict``). Under
        DeepSpeed it is this rank's own, by name, and loads only on the same rank of the same number of ranks.
        Parameter groups carry the seed, the names of their parameters where those are known, and the version of the
        state's form (``apollo_dist.state.identity``).

        Raises:
            ValueError: under FSDP1, where neither this nor ``FSDP.optim_state_dict`` could hold all of it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        for group in self.param_groups:
            make_plain(group, rules_of(group, self.rules))
        if (self._slots or self._pending) and any(map(fsdp1.is_flattened, self._tensors())):
            raise ValueError(
                "FSDP1's optimizer state dict holds tensors in the shapes of parameters only, and would lose APOLLO's "
                "low-rank state: save with apollo_dist.checkpoint.save(folder, model, optimizer), load with "
                "apollo_dist.checkpoint.load"
            )
        found = dict(self._pending)
        form = parameter_state.template if called_to_load_into() else parameter_state.collect
        for build in self._builds.values() if self._by_parameter else ():
            found |= form(build)
        indices: dict[int, int] = {}
        for tensor in self._tensors(named=bool(found)):
            indices.setdefault(id(tensor), len(indices))
        self._identify()
        groups = [
            {**{key: value for key, value in group.items() if key != "params"},
             "params": [indices[id(p)] for p in group["params"]]}
            for group in self.param_groups
        ]  # fmt: skip
        state: dict[Any, Any] = {}
        if found or self._by_parameter:
            names = {index: self._members[key].name for key, index in indices.items()}
            state = {index: dict(found[name]) for index, name in names.items() if name in found}
            assert len(state) == len(found), "a state without a parameter"
        else:
            state.update(self.named_state())
            self._tell_of_conversion()
        state.update({key: value for key, value in self.state.items() if not isinstance(key, Tensor)})
        result: dict[str, Any] = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def _tell_of_conversion(self) -> None:
        """Once: DeepSpeed is about to save what its converter cannot read."""
        divided = any(h.layout == "zero" for build in self._builds.values() for h, _ in build.shards)
        if divided and not self._told and rank_of(self._process_group) == 0:
            logger.warning(
                "what DeepSpeed saves of this optimizer loads at the same number of ranks and stage only; "
                "ds_to_universal cannot convert it, since its moments do not have the shapes of parameters. To "
                "continue elsewhere save with apollo_dist.checkpoint.save(folder, engine) as well"
            )
        self._told = self._told or divided

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave, exactly. Every rank must call it, with the same state.

        The state is judged here, before anything changes. It is copied, keeps its dtypes, and replaces whatever state
        there was: parameters of which it has nothing start anew, as in torch, and the log says which. Options of the
        parameter groups are those that were saved, as in torch; what differs from here, but for lr, is in the log.
        Keys of the state that are no parameters are kept as they are.

        Raises:
            ValueError: on all ranks alike, with what to do: if seed, names, rank or the choice of low-rank matrices
                are others, if the state is another optimizer's, if parameter groups differ in number or size or hold
                bad options, or if ranks load different states. ``accept_at_load`` accepts another seed, other names and
                the projections of older versions.
        """
        given = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, given)
            given = given if changed is None else changed
        # Nothing changes on any rank before all have read it.
        loaded = run_together(lambda: self._read(given), self._process_group)
        check_same_on_all_ranks(loaded.facts(), self._process_group)
        self._accepted = frozenset()
        if rank_of() == 0:
            tell(loaded.notes)
        if self._by_parameter:
            self.state = defaultdict(dict)
        self._init_state()
        self._pending, self._slots, self.param_groups = loaded.pending, loaded.slots, loaded.groups
        self._option_changes.remember(loaded.groups)
        self.state.update(loaded.foreign)
        self._begin([*loaded.pending, *map(_stack, loaded.slots)])
        if loaded.slots:
            # What was frozen, and has no state, starts when it trains.
            frozen = {id(p) for p in self._given if not p.requires_grad}
            self._restored = frozenset(
                m.name for key, m in self._members.items() if key not in frozen or m.name in self._trained
            )
        self._show()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def accept_at_load(self, *what: str) -> None:
        """Let the next load take a state with another seed, with other names, or of an older version's projections.

        Its moments then go on under the projections that this optimizer generates, which is no exact continuation: it
        takes some steps until moments of the old projections are forgotten.

        Args:
            what: one or several of "seed", "names" and "projections". With other names the state goes to parameters by
                their position. ``apollo_dist.checkpoint.load`` goes by name, and heeds "seed" and "projections".

        Raises:
            ValueError: for anything else.
        """
        unknown = sorted(set(what) - {"seed", "names", "projections"})
        if unknown or not what:
            got = ", ".join(map(repr, what)) or "nothing"
            raise ValueError(f'accept_at_load takes "seed", "names" and "projections", got {got}')
        self._accepted = frozenset(what)

    def take_accepted(self) -> frozenset[str]:
        """What ``accept_at_load`` let the load take that begins now; the next one is compared in full again."""
        accepted, self._accepted = self._accepted, frozenset()
        return accepted

    def _identify(self) -> None:
        """Write into the groups whose state they hold: the seed, and the names where parameters have some."""
        identify(self.param_groups, self.seed)
        if all(id(p) in self._members for group in self.param_groups for p in group["params"]):
            members = [self._members_in(group) for group in self.param_groups]
            if all(m.named for group in members for m in group):
                for group, held in zip(self.param_groups, members, strict=True):
                    group[NAMES] = [m.name for m in held]

    def _read(self, state_dict: Mapping[str, Any]) -> Loaded:
        """Read and judge a state dict; local."""
        by_key = any(isinstance(key, int) for key in state_dict["state"])
        self._tensors(named=by_key)
        self._identify()
        return read(
            state_dict,
            self.param_groups,
            self._targets(),
            seed=self.seed,
            accepted=self._accepted,
            validate=self._validate,
            decided_here=(SELECT_BY_NAME,),
            options_of=lambda group: options_of(rules_of(group, self.rules)),
        )

    def _validate(self, group: dict[str, Any], where: str) -> None:
        """Make a loaded group's options Python's own numbers, and check them."""
        rules = rules_of(group, self.rules)
        make_plain(group, rules)
        validate_options(group, where, rules)

    def _targets(self) -> list[list[Target]] | None:
        """The parameters that a state may be loaded for; None where an engine has put its own tensors into groups."""
        if any(id(p) not in self._members for group in self.param_groups for p in group["params"]):
            return None
        members = [self._members_in(group) for group in self.param_groups]
        return targets(self.param_groups, members, self.rules, self._expected_choice(), self._expected_roles())

    def _members_in(self, group: Mapping[str, Any]) -> list[ParamInfo]:
        return [self._members[id(p)] for p in group["params"]]

    def _tensors(self, named: bool = False) -> list[Tensor]:
        """What is in ``param_groups``; where it must be ``named``, parameters that tools have put there are known."""
        held = [p for group in self.param_groups for p in group["params"]]
        if named and self._model.module is not None and any(id(p) not in self._members for p in held):
            self._follow()
            held = [p for group in self.param_groups for p in group["params"]]
        return held

    def _name(self, tensor: Tensor) -> str:
        if id(tensor) not in self._members:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is not one that the optimizer was built with: state of "
                "whole parameters cannot be loaded here"
            )
        return self._members[id(tensor)].name

    def _slot_source(self) -> Callable[[str], Slot]:
        """What gives a build the state of a matrix or tensor by its name; empty if it is new."""
        added = {m.name for m in self._members.values()} - (self._restored or frozenset())

        def slot(name: str) -> Slot:
            if self._restored is not None and name not in self._slots and not added.intersection((name, _stack(name))):
                raise ValueError(
                    f"the loaded state has nothing for {name}; it is from another model or other groups, or from "
                    "another rank or number of ranks"
                )
            return self._slots.setdefault(name, {})

        return slot

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
        parameter_state.restore(build, self._pending, self._process_group)
        for shard, _ in build.shards:
            self._pending.pop(shard.name, None)

    def _show(self) -> None:
        """Fill ``state`` for other tools to look at; under DeepSpeed it is left to that."""
        self._counted = []
        if not (self._pending or self._by_parameter):
            return
        view = {key: value for key, value in self._view.items() if not isinstance(key, Tensor)}
        waiting = {p: self._pending.get(self._name(p)) for p in self._tensors()} if self._pending else {}
        view.update({p: state for p, state in waiting.items() if state is not None})
        for build in self._builds.values():
            for tensor, state, slot in parameter_state.show(build):
                view[tensor] = state
                self._counted.append((state, slot))
        self.state = defaultdict(dict, view)


def _stack(name: str) -> str:
    """The parameter that a matrix ``name[index]`` is part of; the name itself for others."""
    return name.rpartition("[")[0] if name.endswith("]") else name
