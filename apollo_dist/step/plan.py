"""From parameter groups to the plan of a step: layouts read, low-rank members chosen, states checked; all local."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.table import STORED, choose
from ..rules.base import MatrixRule, Rules
from ..rules.groups import SELECT_BY_NAME, STOCHASTIC_ROUNDING, Views, rule_of
from ..sharding import detect
from ..sharding.deepspeed import zero, zero_engine
from ..sharding.local_shard import PARAMETER_LAYOUTS, LocalShard
from ..sharding.names import abbreviate, canonical_name, check_unique
from ..sharding.parameters import ParamInfo
from .elementwise import ElementwiseTensor
from .fingerprint import fingerprint
from .rows import checksums, seeded
from .shard_group import Entry, ShardGroupStep
from .specs import check_matrix, specs_of

if TYPE_CHECKING:
    from ..rules.roles import Role
    from ..state.slots import Slot
    from .failing import Steps
    from .matrix import Matrix


@dataclass
class StepPlan:
    """Everything that a ``step()`` on the same tensors needs again.

    Attributes:
        tensors: the tensors of ``param_groups``, kept so that their ids stay theirs.
        shard_groups: the matrices that matrix rules update, by part (``ParamInfo.part``) and shard group.
        elementwise: the other parameters, as far as this rank holds any of them.
        elementwise_shapes, element_rules: of the other parameters, wherever they are held, rules and shapes, and rules
            by name.
        shards: of every parameter, also those of which this rank holds nothing, with its group.
        facts: what all ranks must agree on before the first exchange.
        chosen: for the log, which matrices the library chose; "" where groups with a rank say it.
        groups: ``param_groups``, kept like the tensors.
        idle: parameters that are frozen and never trained: name, tensor, group. They have no state and no part in the
            exchange.
        steps: what takes the steps; set by whoever made the plan.
    """

    tensors: list[Tensor]
    shard_groups: list[ShardGroupStep] = field(default_factory=list)
    elementwise: list[ElementwiseTensor] = field(default_factory=list)
    elementwise_shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    element_rules: dict[str, str] = field(default_factory=dict)
    shards: list[tuple[LocalShard, dict[str, Any]]] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    chosen: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)
    idle: list[tuple[str, Tensor, dict[str, Any]]] = field(default_factory=list)
    steps: Steps = field(init=False)

    def names(self) -> set[str]:
        """Names of all matrices and tensors."""
        return {m.spec.name for group_step in self.shard_groups for m in group_step.matrices} | {
            a.shard.name for a in self.elementwise
        }

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def gradients(self) -> list[Tensor]:
        """This rank's gradients, each once."""
        shards = [m.shard for group_step in self.shard_groups for m in group_step.matrices] + [
            a.shard for a in self.elementwise
        ]
        found = (shard.grad() for shard in {id(shard): shard for shard in shards}.values())
        return [grad for grad in found if grad is not None and grad.numel()]

    def summary(self) -> str:
        """One line: what is low-rank, what is not, which layout, what is exchanged."""
        matrices = [m for group_step in self.shard_groups for m in group_step.matrices]
        layouts = sorted({m.shard.layout for m in matrices} | {a.shard.layout for a in self.elementwise})
        shared = sum(group_step.plan.shared_channels for group_step in self.shard_groups)
        exchanged = sum(sum(group_step.exchange.bytes_sent) for group_step in self.shard_groups)
        whole, refresh = (sum(group_step.whole.bytes_sent[i] for group_step in self.shard_groups) for i in (0, 1))
        refreshed = f", and {refresh:,} when projections are made anew" if refresh else ""
        said = [*self._matrices(matrices), *self._tensors()]
        return (
            f"{', '.join(said)}; layout {', '.join(layouts)}; "
            f"{shared:,} shared channels; this rank sends {exchanged + whole:,} bytes a step"
            f"{refreshed}; {self._kernels()}{self._rounding()}{self.chosen}{self._idle()}"
        )

    @staticmethod
    def _matrices(matrices: Sequence[Matrix]) -> Iterator[str]:
        """What becomes of matrices, by rule: those with a projection are low-rank."""
        for name in dict.fromkeys(m.rule.name for m in matrices):
            mine = [m for m in matrices if m.rule.name == name]
            elements = sum(m.spec.m * m.spec.n for m in mine)
            ranks = sorted({m.spec.rank for m in mine})
            what = f"are low-rank (rank {', '.join(map(str, ranks))})" if any(ranks) else f"take {name}"
            yield f"{len(mine)} matrices with {elements:,} elements {what}"

    def _tensors(self) -> Iterator[str]:
        """What becomes of other parameters, by rule."""
        for name in dict.fromkeys(name for name, _ in self.elementwise_shapes):
            shapes = [torch.Size(shape) for rule, shape in self.elementwise_shapes if rule == name]
            yield f"{len(shapes)} tensors with {sum(shape.numel() for shape in shapes):,} elements take {name}"

    def _kernels(self) -> str:
        """What steps compute with; where that is of two kinds, for how many."""
        used = [m.kernels.name for group_step in self.shard_groups for m in group_step.matrices]
        used += [t.kernels.name for t in self.elementwise]
        kinds = sorted(set(used))
        if len(kinds) < 2:
            return f"kernels: {''.join(kinds) or 'none'}"
        return "kernels: " + ", ".join(f"{kind} for {used.count(kind)} of this rank's parameters" for kind in kinds)

    def _rounding(self) -> str:
        """Which weights are rounded stochastically, if any."""
        asked = [shard for shard, group in self.shards if group[STOCHASTIC_ROUNDING]]
        count = sum(shard.in_bfloat16 for shard in asked)
        return f"; stochastic rounding of {count} of {len(self.shards)} parameters, which are bf16" if count else ""

    def _idle(self) -> str:
        if not self.idle:
            return ""
        names = abbreviate(name for name, _, _ in self.idle)
        return f"; frozen, without state until they require a gradient: {names}"


def plan_step(
    groups: Sequence[dict[str, Any]],
    members: Mapping[int, ParamInfo],
    engine: zero.Engine,
    slots: Callable[[str], Slot],
    rules: Rules,
    decide: Callable[[Mapping[int, str], zero.Engine], Mapping[str, bool]],
    role_of: Callable[[str], Role],
    *,
    seed: int,
    cache_projection: bool | str,
    kernels: str = "auto",
    trained: Mapping[str, int] | None = None,
    generation: int = 0,
) -> StepPlan:
    """Read the layouts of all parameters in ``groups`` and prepare what a step needs.

    Args:
        groups: the optimizer's ``param_groups`` as this step sees them.
        members: the parameters that the optimizer was given, by ``id``.
        engine: DeepSpeed's part in this step.
        slots: returns the state of a matrix or tensor by name: empty, or filled by an earlier build or a load.
        rules: of groups that name none.
        decide: takes the names of the members by ``id`` and the engine, and returns by name whether a parameter of a
            group without a rank of its own is low-rank.
        role_of: what a parameter is in its model, by name; asked after ``decide``.
        seed: of the projections.
        cache_projection, kernels: as in ``APOLLO``.
        trained: parameters that have state, by name, each with the generation in which it began. Others that are
            frozen at present are ``idle``.
        generation: of the parameters that begin now. Who owns a channel depends on what is planned together, so a
            generation has a plan of its own, and the states of older ones stay where they are.

    Raises:
        ValueError: if a layout cannot be read or is not supported, or a loaded state does not fit.
    """
    if engine.driver is not None:
        zero_engine.check_supported(engine.driver)
    trained = {} if trained is None else trained
    names = _names(members, engine)
    chosen = decide(names, engine)
    parts = {names[key]: m.part for key, m in members.items()}
    plan = StepPlan([], groups=list(groups))
    draft = _Draft(plan, rules, chosen, role_of, slots, parts, trained, generation, kernels)
    if any(group.get(SELECT_BY_NAME) for group in groups):
        draft.plan.chosen = f"; chosen: {abbreviate(name for name in names.values() if chosen.get(name))}"
    seen: list[list[ParamInfo]] = []
    known = {None, *trained}  # what has no name here is DeepSpeed's
    for group in groups:
        working = [t for t in group["params"] if t.requires_grad or names.get(id(t)) in known]
        draft.plan.tensors += working
        kept = set(map(id, working))
        draft.plan.idle += [(names[id(t)], t, group) for t in group["params"] if id(t) not in kept]
        shards = [seeded(shard, seed) for shard in detect.read(working, partial(_name_of, names), engine)]
        seen.append([ParamInfo(shard.name, shard.shape, shard.dtype, True) for shard in shards])
        for shard in shards:
            draft.add(shard, group)
    draft.plan.facts = fingerprint(seed, groups, seen, rules) | checksums(shard for shard, _ in draft.plan.shards)
    draft.make_shard_groups(cache_projection)
    return draft.plan


def check_rounding(shards: Sequence[tuple[LocalShard, Mapping[str, Any]]]) -> None:
    """Raise ValueError if groups ask for stochastic rounding, and no weight of theirs is in bf16."""
    asked = [shard for shard, group in shards if group[STOCHASTIC_ROUNDING]]
    if asked and not any(shard.in_bfloat16 for shard in asked):
        dtypes = {str(shard.dtype).removeprefix("torch.") if shard.rows is None else "int8" for shard in asked}
        found = " and ".join(sorted(dtypes))
        raise ValueError(
            f"stochastic_rounding=True rounds weights in bfloat16, and the weights that this step updates are {found}: "
            "it would do nothing. Leave it out, also in parameter groups; or train bf16 weights without fp32 masters "
            "(DeepSpeed's bf16 and mixed precision keep fp32 masters, which lose nothing to rounding)"
        )


@dataclass
class _Draft:
    """A plan while it is made: parameters are sorted by the rules that update them.

    Attributes:
        plan: what is made.
        rules, chosen, role_of, slots: as ``plan_step`` has them.
        parts: by name, which parameters step together.
        trained, generation: in which generation a parameter's state began, and that of the others.
        kernels: what steps compute with, as ``plan_step`` has it.
        entries: matrices by what has to be common for them to share a plan.
    """

    plan: StepPlan
    rules: Rules
    chosen: Mapping[str, bool]
    role_of: Callable[[str], Role]
    slots: Callable[[str], Slot]
    parts: Mapping[str, int]
    trained: Mapping[str, int]
    generation: int
    kernels: str
    entries: dict[tuple[Any, ...], list[Entry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._views = Views(self.rules)

    def add(self, shard: LocalShard, group: dict[str, Any]) -> None:
        """Add one parameter: its matrices, or as a tensor that an element rule updates."""
        plan = self.plan
        plan.shards.append((shard, group))
        view = self._views.of(group, self.role_of(shard.name))
        rule = rule_of(view, shard.name, shard.shape, self.rules, self.chosen)
        if isinstance(rule, MatrixRule):
            if rule.chosen:
                check_matrix(shard.name, shard.shape, group["rank"])
            began = self.trained.get(shard.name, self.generation)
            key = (self.parts.get(shard.name, 0), began, id(shard.group.process_group), shard.device)
            listed = specs_of(shard, rule, view)
            self.entries.setdefault(key, []).extend(Entry(shard, *each, rule, view) for each in listed)
            return
        plan.element_rules[shard.name] = rule.name
        plan.elementwise_shapes.append((rule.name, tuple(shard.shape)))
        # Of a parameter in ``param_groups`` every rank counts the steps, also where it has no element of it.
        if shard.numel or shard.layout in PARAMETER_LAYOUTS:
            table = choose(self.kernels, shard.device, shard.compute_dtype, known=shard.dtype in STORED)
            plan.elementwise.append(ElementwiseTensor(shard, rule, group, self.slots(shard.name), table))

    def make_shard_groups(self, cache_projection: bool | str) -> None:
        """Plan the exchange of the matrices that were added, and load their states."""
        check_rounding(self.plan.shards)
        for i, entries in enumerate(self.entries.values()):
            made = ShardGroupStep(entries)
            keep = made.device.type == "cpu" if cache_projection == "auto" else bool(cache_projection)
            made.load(self.slots, keep, self.kernels)
            self.plan.shard_groups.append(made)
            self.plan.facts[f"exchange plan {i}"] = made.plan.digest


def _name_of(names: Mapping[int, str], tensor: Tensor) -> str:
    if id(tensor) not in names:
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} is not one that the optimizer was built with. Build "
            "APOLLO after the model is wrapped or sharded; under DeepSpeed, call optimizer.attach(engine)"
        )
    return names[id(tensor)]


def _names(members: Mapping[int, ParamInfo], engine: zero.Engine) -> dict[int, str]:
    """Names by ``id``: as given; where none was, the engine's; else ``param_0, param_1, ...``."""
    engine_names: dict[int, str] = zero.names(engine.wrapper)
    if engine.module is not None:
        engine_names.update((id(p), name) for name, p in engine.module.named_parameters())
    names = {}
    for key, m in members.items():
        names[key] = m.name if m.named else canonical_name(engine_names.get(key, m.name))
    check_unique(names.values())
    return names
