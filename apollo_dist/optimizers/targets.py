"""What state each parameter of an optimizer may be given, for the judgement of a state that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..rules.base import Rules
from ..sharding.local_shard import matrices
from ..state.loaded import Target
from .param_groups import CHOOSE, Member


def targets(
    groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Member]], rules: Rules, chosen: Mapping[str, bool]
) -> list[list[Target]]:
    """The parameters of each group as a loaded state meets them.

    Args:
        groups: parameter groups.
        members: of each group.
        rules: which declare the state.
        chosen: by name whether a parameter is low-rank that the library has decided on; others it decides on at the
            first step.
    """
    shapes = [[_shapes(rules, m.shape, group) for m in held] for group, held in zip(groups, members, strict=True)]
    element = rules.element
    own = {key for listed in shapes for each in listed for key in each or ()} - set(element.state)
    return [
        [
            Target(
                m.name,
                of_matrix,
                dict.fromkeys(element.state, m.shape),
                _is_low_rank(group, m.name, chosen),
                p.requires_grad,
                own,
                element.name,
            )
            for m, p, of_matrix in zip(held, group["params"], listed, strict=True)
        ]
        for group, held, listed in zip(groups, members, shapes, strict=True)
    ]


def _shapes(rules: Rules, shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the state of a parameter that the matrix rule updates, by name; None if it is no matrix."""
    if len(shape) not in (2, 3) or 0 in shape or group["rank"] is None:
        return None
    count, m, n = matrices(shape)
    declared = rules.matrix.spec(m, n, group)
    channels = m if declared.reduce.by_rows(m, n) else n
    found: dict[str, tuple[int, ...]] = dict.fromkeys(declared.state.matrix, () if count == 1 else (count,))
    return found | {name: (count * channels, width) for name, width in declared.state.channel.items()}


def _is_low_rank(group: Mapping[str, Any], name: str, chosen: Mapping[str, bool]) -> bool | None:
    """Whether a parameter is low-rank; None where that is decided at the first step."""
    if group["rank"] is None or not group.get(CHOOSE):
        return group["rank"] is not None
    return chosen.get(name)
