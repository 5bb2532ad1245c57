"""The parameters of an optimizer: groups, checked when they come, and what of them is low-rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..distributed import check_same_on_all_ranks, rank_of, run_together
from ..rules.groups import COMMON, SELECT_BY_NAME, options_of
from ..rules.registry import RULE, rules_of
from ..selection.choice import Parameter
from ..sharding.deepspeed import zero
from ..sharding.names import check_unique
from ..state.identity import NAMES, check_seed_of_group
from ..step.fingerprint import fingerprint
from ..step.specs import check_matrix
from .attributes import OptimizerAttributes
from .options import check_group_keys, drop_other_keywords, make_plain, validate_options
from .parameters import check_named_alike, check_no_duplicates, param_info, split_params

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..rules.roles import Role
    from ..sharding.parameters import ParamInfo

logger = logging.getLogger("apollo_dist")


class GroupedOptimizer(OptimizerAttributes):
    """Parameter groups, with each parameter's name and logical shape, however it is sharded."""

    def _decide(self, names: Mapping[int, str], engine: zero.Engine) -> Mapping[str, bool]:
        """By name whether a parameter is low-rank that came in a group without a rank; decided once, then kept.

        Args:
            names: of the members by ``id``.
            engine: DeepSpeed's part in this step, which may know the model.

        Raises:
            ValueError: if parameters cannot be named, or if nothing is low-rank.
        """
        module = engine.module if engine.module is not None else self._model.module
        if self._reads_roles():
            self._roles.decide(self._parameters(names), module, type(self).__name__)
        if not self._choose:
            return self._choice.low_rank
        parameters = self._to_choose(names)
        unnamed = [p for p in parameters if not p.named]
        bare = [m for m in self._members.values() if m.choose and not m.named]
        if bare and engine.wrapper is not None and module is None and not self._choice.covers(parameters):
            raise ValueError(
                "matrices are to be chosen by the model's structure, but DeepSpeed's engine was not found among the "
                "callers of step(). Call engine.step(), or optimizer.attach(engine) before the first step"
            )
        if unnamed and module is not None:
            raise ValueError(
                f"{len(unnamed)} of {len(self._members)} parameters, the first of shape {unnamed[0].shape}, are not in "
                f"the model that is trained ({type(module).__name__}), so they have no name to draw a projection by. "
                "Pass that model's parameters, or (name, parameter) pairs"
            )
        self._choice.decide(parameters, self.defaults["rank"], module)
        return self._choice.low_rank

    def _reads_roles(self) -> bool:
        """Whether the rules of any group read what a parameter is in its model."""
        return any(rules_of(group, self.rules).reads_role for group in self.param_groups)

    def _expected_roles(self) -> Mapping[str, Role]:
        """By name what a parameter is, as far as it is known before the first step."""
        return self._roles.expected(self._parameters({}), self._model.module) if self._reads_roles() else {}

    def _expected_choice(self) -> Mapping[str, bool]:
        """By name whether a parameter is low-rank, as far as it is known before the first step."""
        parameters = self._to_choose({})
        if not self._choose or not all(p.named for p in parameters):
            return self._choice.low_rank
        return self._choice.expected(parameters, self.defaults["rank"], self._model.module)

    def _to_choose(self, names: Mapping[int, str]) -> list[Parameter]:
        """The parameters that the library chooses among, under the names that are known by now."""
        chosen = {key for key, m in self._members.items() if m.choose}
        return [p for p in self._parameters(names) if p.key in chosen]

    def _parameters(self, names: Mapping[int, str]) -> list[Parameter]:
        """All parameters, under the names that are known by now."""
        frozen = {id(p) for p in self._given if not p.requires_grad}
        found = ((key, names.get(key, m.name), m) for key, m in self._members.items())
        return [Parameter(key, name, m.shape, m.named or name != m.name, key in frozen) for key, name, m in found]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; with ``rank`` it is low-rank, without it is AdamW. Every rank must call it.

        If the optimizer was built from a model, or from groups without any rank, the matrices of a group that does not
        say ``rank`` are chosen here as well, by the same rule. What was chosen before stays as it is. Frozen parameters
        that ``APOLLO(model)`` holds, and that have never trained, move to the group.

        Raises:
            ValueError: on all ranks alike, for unknown keys, bad values, parameters that are there already, or that
                cannot be low-rank in a group with ``rank``, for some parameters with names and others without, or if
                ranks differ. The optimizer is then as it was.
        """
        if not self._constructed:
            self._add_group(param_group)
            return
        before = [(g, list(g["params"]), list(g.get("param_names", ()))) for g in self.param_groups]
        given, members, chosen = list(self._given), dict(self._members), dict(self._choice.low_rank)
        try:
            run_together(lambda: self._add_group(param_group), self._process_group)
            check_same_on_all_ranks(
                lambda: fingerprint(self.seed, self.param_groups, self._members_of_groups(), self.rules),
                self._process_group,
                self._explain,
            )
        except BaseException:
            del self.param_groups[len(before) :]
            for group, params, names in before:
                group.update(params=params, **({"param_names": names} if "param_names" in group else {}))
            self._given, self._members, self._choice.low_rank = given, members, chosen
            raise

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """The local part of ``add_param_group``."""
        group = dict(param_group)
        number = len(self.param_groups)
        where = f"parameter group {number}"
        rules = rules_of(group, self.rules)
        own = rules == self.rules
        if group.get(RULE) is None and self._constructed and self._choose:
            group = without_choice(group, self.defaults["rank"])
        check_seed_of_group(group, self.seed, where)
        drop_other_keywords(group, where)
        others = check_group_keys(group, where, options_of(rules), rules.options)
        make_plain(group, rules)
        pairs = self._model.named(split_params(group["params"], group.pop(NAMES, None)))
        named = next((m.named for m in self._members.values()), None)
        check_named_alike(pairs, where, named)
        choose = group.get(RULE) is None and self._choose and "rank" not in group
        if group.get(RULE) is None and not self._choose and is_chosen(rules):
            group.setdefault("rank", None)
        if choose:
            group[SELECT_BY_NAME] = True
        declared = {key: option.default for key, option in rules.options.items()}
        group = {**declared, **{k: self.defaults[k] for k in (options_of(rules) if own else COMMON)}, **group}
        validate_options(group, where, rules)
        found = [
            param_info(len(self._given) + i, name, tensor, choose=choose) for i, (name, tensor) in enumerate(pairs)
        ]
        tensors = [tensor for _, tensor in pairs]
        self._leave_groups(tensors)
        check_no_duplicates(zip((m.name for m in found), tensors, strict=True), self._members)
        added = dict(zip(map(id, tensors), found, strict=True))
        check_unique(m.name for m in [*self._members.values(), *added.values()])
        if not choose and group.get("rank") is not None:
            if not pairs:
                raise ValueError(f"parameter group {number} asks for rank={group['rank']} but holds no matrix")
            for m in added.values():
                check_matrix(m.name, m.shape, group["rank"])
        group["params"] = tensors
        if named or any(m.named for m in found):
            group[NAMES] = [m.name for m in found]
            for earlier in self.param_groups:  # empty so far, as this one may be
                earlier.setdefault(NAMES, [])
        read = {key: value for key, value in group.items() if key not in self.defaults or key in options_of(rules)}
        super().add_param_group(group)
        for key in self.defaults.keys() - read.keys():  # which torch has added
            del group[key]
        self._members.update(added)
        self._given += tensors
        self._frozen_once.update(m.name for m, p in zip(found, tensors, strict=True) if not p.requires_grad)
        if self._constructed and choose and self._model.module is not None:
            self._decide({key: m.name for key, m in self._members.items()}, zero.Engine())
        module = self._model.module
        if module is not None and self._reads_roles():
            self._roles.decide(self._parameters({}), module, type(self).__name__)
        self._option_changes.remember(self.param_groups)
        if others and rank_of() == 0:
            keys = ", ".join(map(repr, others))
            logger.info("parameter group %d keeps %s, which APOLLO does not read", number, keys)

    def _leave_groups(self, tensors: Sequence[Tensor]) -> None:
        """Take parameters out of their groups that ``APOLLO(model)`` holds only because it holds the whole model.

        These were frozen and have never trained. Whoever adds them to a group now has not passed them before.
        """
        for tensor in tensors if self._constructed and self._from_model else ():
            name = self._members[id(tensor)].name if id(tensor) in self._members else None
            if name not in self._frozen_once or name in self._trained:
                continue
            for group in self.param_groups:
                kept = [i for i, p in enumerate(group["params"]) if p is not tensor]
                for key in ("params", "param_names"):
                    if key in group:
                        group[key] = [group[key][i] for i in kept]
            self._given = [p for p in self._given if p is not tensor]
            del self._members[id(tensor)]

    def _has_state(self, group: dict[str, Any]) -> bool:
        """Whether any parameter of a group has state; what DeepSpeed puts in their places does from the first step."""
        names = (self._members[id(p)].name if id(p) in self._members else None for p in group["params"])
        return any(name in self._trained if name is not None else bool(self._trained) for name in names)

    def _explain(self, fact: str) -> str:
        """What to do about a fact of ``fingerprint`` in which ranks differ, where it is not evident."""
        if not fact.startswith(("parameter ", "number of parameters")):
            return ""
        if self._process_group is not None:
            return ". process_group may hold only ranks that train the same parameters"
        return (
            ". Ranks that train different parameters, such as the stages of a pipeline, each need "
            "process_group=GROUP, the group of the ranks that train the same parameters as they do"
        )

    def _members_of_groups(self) -> list[list[ParamInfo]]:
        return [[self._members[id(p)] for p in group["params"]] for group in self.param_groups]


def is_chosen(rules: Rules) -> bool:
    """Whether the matrices of these rules are chosen: by a group's rank, else by the library."""
    return rules.matrix is not None and rules.matrix.chosen


def without_choice(group: dict[str, Any], rank: int) -> dict[str, Any]:
    """A group of another APOLLO's ``param_groups`` as it was given to that: without a rank, if it came without.

    Raises:
        ValueError: if its matrices were chosen for another rank than ``rank``.
    """
    if not group.get(SELECT_BY_NAME):
        return group
    if group.get("rank") not in (None, rank):
        raise ValueError(
            f"a parameter group comes from an APOLLO that chose matrices for rank {group['rank']}, and this one is to "
            f"choose for rank {rank}: pass rank={group['rank']}, or give the group a rank and no {SELECT_BY_NAME!r}"
        )
    return {key: value for key, value in group.items() if key not in (SELECT_BY_NAME, "rank")}


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Parameters, named parameters or groups as a list of groups.

    Raises:
        ValueError: for an empty list, a set, or parameters and groups in one list.
    """
    if isinstance(params, (set, frozenset)):
        split_params(params)  # which refuses it
    items = [params] if isinstance(params, Tensor) else list(params)
    if not items:
        raise ValueError("APOLLO got an empty parameter list")
    if any(isinstance(item, dict) for item in items):
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("pass either parameters or parameter groups, not both in one list")
        return [dict(item) for item in items]
    return [{"params": items}]
