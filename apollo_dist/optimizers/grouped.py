"""The parameters of an optimizer: groups, checked when they come, and names for what came without or was replaced."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from ..distributed import agree, rank_of, run_together
from ..sharding.deepspeed import zero, zero_engine
from ..step.plan import check_unique, fingerprint
from .model_ref import PresentModel
from .options import OPTIONS, check_group_keys, check_known, drop_other_keywords, make_plain, plain, validate_options
from .param_groups import (
    CHOOSE,
    Member,
    check_matrix,
    choose,
    member,
    name_pattern,
    param_groups,
    split_params,
)
from .stateful import StatefulOptimizer, given_twice

logger = logging.getLogger("apollo_dist")

_ARGUMENTS = (
    "seed", "exclude", "cache_projection", "skip_nonfinite", "max_skipped_steps", "model", "process_group",
)  # fmt: skip


class GroupedOptimizer(StatefulOptimizer):
    """A ``torch.optim.Optimizer`` that knows each parameter's name and logical shape, however it is sharded."""

    def _construct(self, params: Any, options: dict[str, Any], unknown: dict[str, Any]) -> None:
        """The local part of construction; may fail on one rank only."""
        drop_other_keywords(unknown, type(self).__name__)
        check_known(unknown, [*OPTIONS, *_ARGUMENTS], "argument")
        make_plain(options)
        validate_options(options, type(self).__name__)
        self._guard.check()
        self.seed, self.cache_projection = plain(self.seed), plain(self.cache_projection)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.cache_projection not in ("auto", True, False):
            raise ValueError(f'cache_projection must be "auto", True or False, got {self.cache_projection!r}')
        name_pattern(self.exclude)
        given_model = isinstance(params, nn.Module)
        self._model.check(params)
        groups = param_groups(params, exclude=self.exclude, **options) if given_model else _as_groups(params)
        self._choose = all(group.get("rank") is None for group in groups)
        if self.exclude is not None and not given_model and not self._choose:
            raise ValueError(
                f"exclude={self.exclude!r} has no effect on groups with a rank; put the parameters that it is to "
                "exclude into a group without rank"
            )
        super().__init__(groups, options if self._choose else {**options, "rank": None})
        if self._choose:
            # Without names the choice waits for the engine's, at the first step; here only that there is any matrix.
            named = all(m.named for m in self._members.values())
            chosen = choose(self._members.values(), exclude=self.exclude if named else None)
            if named:
                for group, held in zip(self.param_groups, self._members_of_groups(), strict=True):
                    for m in held:
                        if m.name in chosen:
                            check_matrix(m.name, m.shape, group["rank"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; with ``rank`` it is low-rank, without it is AdamW. Every rank must call it.

        If the optimizer was built from groups without any rank, members are chosen by name here as well.

        Raises:
            ValueError: on all ranks alike, for unknown keys, bad values, parameters that are there already, or that
                cannot be low-rank in a group with ``rank``, or if ranks differ. The optimizer is then as it was.
        """
        if not self._constructed:
            self._add_group(param_group)
            return
        groups, given, members = len(self.param_groups), len(self._given), dict(self._members)
        try:
            run_together(lambda: self._add_group(param_group), self._process_group)
            agree(
                lambda: fingerprint(self.seed, self.param_groups, self._members_of_groups()),
                self._process_group,
                self._explain,
            )
        except BaseException:
            del self.param_groups[groups:], self._given[given:]
            self._members = members
            raise

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """The local part of ``add_param_group``."""
        group = dict(param_group)
        number = len(self.param_groups)
        drop_other_keywords(group, f"parameter group {number}")
        others = check_group_keys(group, f"parameter group {number}")
        make_plain(group)
        pairs = self._model.named(split_params(group["params"]))
        explicit = group.get("rank") is not None
        group["rank"] = group.get("rank", self.defaults["rank"] if self._choose else None)
        if self._choose and not explicit:
            group[CHOOSE] = True
        validate_options({**self.defaults, **group}, f"parameter group {number}")
        found = [member(len(self._given) + i, name, tensor) for i, (name, tensor) in enumerate(pairs)]
        tensors = [tensor for _, tensor in pairs]
        given_twice(zip((m.name for m in found), tensors, strict=True), self._members)
        added = dict(zip(map(id, tensors), found, strict=True))
        check_unique(m.name for m in [*self._members.values(), *added.values()])
        if explicit:
            if not pairs:
                raise ValueError(f"parameter group {number} asks for rank={group['rank']} but holds no matrix")
            for m in added.values():
                check_matrix(m.name, m.shape, group["rank"])
        group.pop("param_names", None)
        group["params"] = tensors
        super().add_param_group(group)
        self._members.update(added)
        self._given += tensors
        self._option_changes.remember(self.param_groups)
        if others and rank_of() == 0:
            keys = ", ".join(map(repr, others))
            logger.info("parameter group %d keeps %s, which APOLLO does not read", number, keys)

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

    def _members_of_groups(self) -> list[list[Member]]:
        return [[self._members[id(p)] for p in group["params"]] for group in self.param_groups]

    def attach(self, engine: Any) -> None:
        """Name the DeepSpeed engine that drives this optimizer, or the model whose parameters it updates.

        An engine is found at the first step; attaching makes that explicit, and debuggable. A model names parameters
        that came without names, so that the choice and the projections are those of ``APOLLO(model)``; and where
        parameters were replaced in the model (by ``fully_shard``, by Accelerate) the optimizer follows, by name.
        ``Accelerator.prepare`` and the Hugging Face ``Trainer`` attach their model themselves.

        Args:
            engine: what ``deepspeed.initialize`` returned first, or the model, wrapped or not.

        Raises:
            ValueError: if the engine drives another optimizer, or a parameter is not the model's; on all ranks alike.
        """
        if isinstance(engine, nn.Module) and not zero_engine.is_engine(engine):
            self._attach_model(engine, strict=True)
        else:
            self._engine = zero.from_engine(engine, self)

    def _attach_model(self, model: nn.Module, strict: bool) -> None:
        """``attach`` for a model; a collective."""
        self._model = PresentModel(model)
        run_together(lambda: self._follow(strict), self._process_group)

    def _follow(self, strict: bool = False) -> None:
        """Take the model's parameters and names; may fail on one rank only."""
        self._model.check(None)
        self._members = self._model.follow(self.param_groups, self._members, strict=strict)
        self._given, self._builds = [p for group in self.param_groups for p in group["params"]], {}

    def _let_go(self) -> None:
        """Hold no parameters, only their names: they are about to be replaced, and ``attach`` follows."""
        # Under keys that are no ids, since those of freed tensors are used again.
        self._members = {-1 - i: m for i, m in enumerate(self._members.values())}
        self._given, self._builds = [], {}


def _as_groups(params: Any) -> list[dict[str, Any]]:
    """Parameters, named parameters or groups as a list of groups."""
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
