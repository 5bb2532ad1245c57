"""What state each parameter of an optimizer may be given, for the judgement of a state that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..rules.base import MatrixRule, Rules
from ..rules.groups import SELECT_BY_NAME, Views
from ..rules.registry import rules_of
from ..rules.roles import UNKNOWN, Role
from ..sharding.local_shard import matrices
from ..state.loaded import Target
from ..state.slots import PROJECTION

if TYPE_CHECKING:
    from ..sharding.parameters import ParamInfo


def targets(
    groups: Sequence[Mapping[str, Any]],
    members: Sequence[Sequence[ParamInfo]],
    own: Rules,
    chosen: Mapping[str, bool],
    roles: Mapping[str, Role],
) -> list[list[Target]]:
    """The parameters of each group as a loaded state meets them.

    Args:
        groups: parameter groups.
        members: of each group.
        own: rules of groups that name none; rules declare the state.
        chosen: by name whether the matrix rule takes a parameter that the library has decided on; others it decides on
            at the first step.
        roles: by name what a parameter is in its model.
    """
    views = Views(own)
    listed: list[list[tuple[ParamInfo, Tensor, Mapping[str, Any], Rules]]] = []
    for group, held in zip(groups, members, strict=True):
        rules = rules_of(group, own)
        seen = [views.of(group, roles.get(m.name, Role(UNKNOWN))) for m in held]
        listed.append([(m, p, view, rules) for m, p, view in zip(held, group["params"], seen, strict=True)])
    shapes = [[_shapes(rules, m.shape, view) for m, _, view, rules in each] for each in listed]
    names = {key for each in shapes for found in each for key in found or ()}
    return [
        [_target(*one, found, chosen, names) for one, found in zip(each, of_group, strict=True)]
        for each, of_group in zip(listed, shapes, strict=True)
    ]


def _target(
    m: ParamInfo,
    parameter: Tensor,
    group: Mapping[str, Any],
    rules: Rules,
    of_matrix: dict[str, tuple[int, ...]] | None,
    chosen: Mapping[str, bool],
    names: set[str],
) -> Target:
    by_matrix = (
        chosen.get(m.name) if group.get(SELECT_BY_NAME) else isinstance(rules.rule_of(m.shape, group), MatrixRule)
    )
    element = rules.element
    own = names - set(element.state)
    of_element = dict.fromkeys(element.state_of(group), m.shape)
    return Target(m.name, of_matrix, of_element, by_matrix, parameter.requires_grad, own, element.name)


def _shapes(rules: Rules, shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the state of a parameter that the matrix rule updates, by name; None if it takes no such."""
    rule = rules.rule_of(shape, group)
    if len(shape) not in (1, 2, 3) or 0 in shape or not isinstance(rule, MatrixRule):
        return None
    count, m, n = matrices(shape)
    declared = rule.spec(m, n, group)
    channels = m // declared.reduce.block if declared.reduce.by_rows(m, n) else n
    found: dict[str, tuple[int, ...]] = dict.fromkeys(declared.state.matrix, () if count == 1 else (count,))
    found |= dict.fromkeys(declared.state.element, shape)
    projection = declared.projection_shape(m, n)
    if projection is not None:
        found[PROJECTION] = projection if count == 1 else (count, *projection)
    return found | {name: (count * channels, width) for name, width in declared.state.channel.items()}
