"""The parameters of an optimizer: their names and logical shapes, however they are sharded, and what is low-rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..rules.registry import rules_of
from ..selection.parameter import Parameter
from ..sharding.names import check_unique
from ..step.specs import check_matrix
from .parameters import check_no_duplicates, param_info

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..rules.roles import Role
    from ..selection.kept import KeptChoice
    from ..selection.roles import KeptRoles
    from ..sharding.deepspeed import zero
    from ..sharding.parameters import ParamInfo

Groups = Sequence[Mapping[str, Any]]


class Members:
    """Who an optimizer's parameters are, and what was decided about each.

    Args:
        rules: of groups that name none.
        title: the optimizer's name, for messages.
        choice, roles: what was decided, by name.

    Attributes:
        infos: by the parameter's ``id``.
        given: the parameters in the order in which they came; kept alive, so that their ids stay theirs.
        chosen: whether the library chooses the low-rank matrices of groups without a rank.
        rank: r of what it chooses.
        of_model: whether all parameters of a model were given.
        frozen_once: names of parameters that were frozen once, while ranks have not compared their gradients.
    """

    def __init__(self, rules: Rules, title: str, choice: KeptChoice, roles: KeptRoles) -> None:
        self._rules, self._title = rules, title
        self.choice, self.roles = choice, roles
        self.infos: dict[int, ParamInfo] = {}
        self.given: list[Tensor] = []
        self.chosen, self.rank, self.of_model = False, 0, False
        self.frozen_once: set[str] = set()

    # ---- who they are ---------------------------------------------------------------------------------------------

    def knows_all(self, groups: Groups) -> bool:
        """Whether the groups hold these parameters alone, and none that an engine has put in their places."""
        return all(id(p) in self.infos for group in groups for p in group["params"])

    def of(self, groups: Groups) -> list[list[ParamInfo]]:
        """The members of each group."""
        return [[self.infos[id(p)] for p in group["params"]] for group in groups]

    def name(self, tensor: Tensor) -> str:
        """The name of a parameter.

        Raises:
            ValueError: for one that the optimizer was not built with.
        """
        if id(tensor) not in self.infos:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is not one that the optimizer was built with: state of "
                "whole parameters cannot be loaded here"
            )
        return self.infos[id(tensor)].name

    @property
    def named(self) -> bool | None:
        """Whether parameters came with names, all or none; None if there are no parameters."""
        return next((m.named for m in self.infos.values()), None)

    # ---- which they are -------------------------------------------------------------------------------------------

    def admit(
        self, number: int, pairs: Sequence[tuple[str | None, Tensor]], *, choose: bool, rank: int | None
    ) -> dict[int, ParamInfo]:
        """What a new group's parameters are, checked against those that are there. Nothing is kept yet.

        Args:
            number: of the group.
            pairs: (name or None, parameter).
            choose: whether the library chooses among them.
            rank: r of the group, whose parameters must then be matrices.

        Raises:
            ValueError: for parameters or names that are there already, and for what cannot be low-rank.
        """
        found = [param_info(len(self.given) + i, name, tensor, choose=choose) for i, (name, tensor) in enumerate(pairs)]
        tensors = [tensor for _, tensor in pairs]
        check_no_duplicates(zip((m.name for m in found), tensors, strict=True), self.infos)
        added = dict(zip(map(id, tensors), found, strict=True))
        check_unique(m.name for m in [*self.infos.values(), *added.values()])
        if not choose and rank is not None:
            if not pairs:
                raise ValueError(f"parameter group {number} asks for rank={rank} but holds no matrix")
            for m in added.values():
                check_matrix(m.name, m.shape, rank)
        return added

    def add(self, added: Mapping[int, ParamInfo], tensors: Sequence[Tensor]) -> None:
        """Keep what ``admit`` returned of parameters."""
        self.infos.update(added)
        self.given += tensors
        self.frozen_once.update(added[id(p)].name for p in tensors if not p.requires_grad)

    def leave(self, groups: Sequence[dict[str, Any]], tensors: Sequence[Tensor], trained: Mapping[str, int]) -> None:
        """Take parameters out of their groups that are there only because the whole model was given.

        These were frozen and have never trained. Whoever adds them to a group now has not passed them before.

        Args:
            groups: of the optimizer, changed in place.
            tensors: what is about to be added.
            trained: names of the parameters that have state.
        """
        for tensor in tensors if self.of_model else ():
            name = self.infos[id(tensor)].name if id(tensor) in self.infos else None
            if name not in self.frozen_once or name in trained:
                continue
            for group in groups:
                kept = [i for i, p in enumerate(group["params"]) if p is not tensor]
                for key in ("params", "param_names"):
                    if key in group:
                        group[key] = [group[key][i] for i in kept]
            self.given = [p for p in self.given if p is not tensor]
            del self.infos[id(tensor)]

    def replace(self, infos: Mapping[int, ParamInfo], groups: Groups) -> None:
        """Take other parameters, in the places of those that were there."""
        self.infos, self.given = dict(infos), [p for group in groups for p in group["params"]]

    def release(self) -> None:
        """Hold no parameters, only their names."""
        # Under keys that are no ids, since those of freed tensors are used again.
        self.infos = {-1 - i: m for i, m in enumerate(self.infos.values())}
        self.given = []

    # ---- what is low-rank -----------------------------------------------------------------------------------------

    def decide(
        self, groups: Groups, names: Mapping[int, str], engine: zero.Engine, model: nn.Module | None
    ) -> Mapping[str, bool]:
        """By name whether a parameter is low-rank that came in a group without a rank; decided once, then kept.

        Args:
            groups: all of the optimizer.
            names: of the members by ``id``, where they are known by now.
            engine: DeepSpeed's part in this step, which may know the model.
            model: that the optimizer knows.

        Raises:
            ValueError: if parameters cannot be named, or if nothing is low-rank.
        """
        module = engine.module if engine.module is not None else model
        if self.reads_roles(groups):
            self.decide_roles(module, names)
        if not self.chosen:
            return self.choice.low_rank
        parameters = self.to_choose(names)
        unnamed = [p for p in parameters if not p.named]
        bare = [m for m in self.infos.values() if m.choose and not m.named]
        if bare and engine.wrapper is not None and module is None and not self.choice.covers(parameters):
            raise ValueError(
                "matrices are to be chosen by the model's structure, but DeepSpeed's engine was not found among the "
                "callers of step(). Call engine.step(), or optimizer.attach(engine) before the first step"
            )
        if unnamed and module is not None:
            raise ValueError(
                f"{len(unnamed)} of {len(self.infos)} parameters, the first of shape {unnamed[0].shape}, are not in "
                f"the model that is trained ({type(module).__name__}), so they have no name to draw a projection by. "
                "Pass that model's parameters, or (name, parameter) pairs"
            )
        self.choice.decide(parameters, self.rank, module)
        return self.choice.low_rank

    def decide_roles(self, model: nn.Module | None, names: Mapping[int, str] | None = None) -> None:
        """Decide what each parameter is in its model; decided once, then kept."""
        self.roles.decide(self._parameters(names or {}), model, self._title)

    def reads_roles(self, groups: Groups) -> bool:
        """Whether the rules of any group read what a parameter is in its model."""
        return any(rules_of(group, self._rules).reads_role for group in groups)

    def expected_roles(self, groups: Groups, model: nn.Module | None) -> Mapping[str, Role]:
        """By name what a parameter is, as far as it is known before the first step."""
        return self.roles.expected(self._parameters({}), model) if self.reads_roles(groups) else {}

    def expected_choice(self, model: nn.Module | None) -> Mapping[str, bool]:
        """By name whether a parameter is low-rank, as far as it is known before the first step."""
        parameters = self.to_choose({})
        if not self.chosen or not all(p.named for p in parameters):
            return self.choice.low_rank
        return self.choice.expected(parameters, self.rank, model)

    def to_choose(self, names: Mapping[int, str]) -> list[Parameter]:
        """The parameters that the library chooses among, under the names that are known by now."""
        chosen = {key for key, m in self.infos.items() if m.choose}
        return [p for p in self._parameters(names) if p.key in chosen]

    def names(self) -> dict[int, str]:
        """The names by ``id``."""
        return {key: m.name for key, m in self.infos.items()}

    def _parameters(self, names: Mapping[int, str]) -> list[Parameter]:
        """All parameters, under the names that are known by now."""
        frozen = {id(p) for p in self.given if not p.requires_grad}
        found = ((key, names.get(key, m.name), m) for key, m in self.infos.items())
        return [Parameter(key, name, m.shape, m.named or name != m.name, key in frozen) for key, name, m in found]
