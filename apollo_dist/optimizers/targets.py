"""What state each parameter of an optimizer may be given, for the judgement of a state that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..rules.base import MatrixRule, Rules
from ..rules.registry import rules_of
from ..sharding.local_shard import matrices
from ..state.loaded import Target
from .param_groups import CHOOSE, Member


def targets(
    groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Member]], own: Rules, chosen: Mapping[str, bool]
) -> list[list[Target]]:
    """The parameters of each group as a loaded state meets them.

    Args:
        groups: parameter groups.
        members: of each group.
        own: rules of groups that name none; rules declare the state.
        chosen: by name whether the matrix rule takes a parameter that the library has decided on; others it decides on
            at the first step.
    """
    rules = [rules_of(group, own) for group in groups]
    shapes = [
        [_shapes(each, m.shape, group) for m in held] for each, group, held in zip(rules, groups, members, strict=True)
    ]
    names = {key for listed in shapes for each in listed for key in each or ()}
    return [
        [
            _target(m, p, of_matrix, group, each, chosen, names)
            for m, p, of_matrix in zip(held, group["params"], listed, strict=True)
        ]
        for each, group, held, listed in zip(rules, groups, members, shapes, strict=True)
    ]


def _target(
    m: Member,
    parameter: Tensor,
    of_matrix: dict[str, tuple[int, ...]] | None,
    group: Mapping[str, Any],
    rules: Rules,
    chosen: Mapping[str, bool],
    names: set[str],
) -> Target:
    by_matrix = chosen.get(m.name) if group.get(CHOOSE) else isinstance(rules.rule_of(m.shape, group), MatrixRule)
    element = rules.element
    own = names - set(element.state)
    of_element = dict.fromkeys(element.state, m.shape)
    return Target(m.name, of_matrix, of_element, by_matrix, parameter.requires_grad, own, element.name)


def _shapes(rules: Rules, shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the state of a parameter that the matrix rule updates, by name; None if it takes no such."""
    rule = rules.rule_of(shape, group)
    if len(shape) not in (2, 3) or 0 in shape or not isinstance(rule, MatrixRule):
        return None
    count, m, n = matrices(shape)
    declared = rule.spec(m, n, group)
    channels = m if declared.reduce.by_rows(m, n) else n
    found: dict[str, tuple[int, ...]] = dict.fromkeys(declared.state.matrix, () if count == 1 else (count,))
    return found | {name: (count * channels, width) for name, width in declared.state.channel.items()}
