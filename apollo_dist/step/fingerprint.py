"""What the ranks of one optimizer must have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..rules.groups import options_of
from ..rules.registry import RULE, rules_of

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..rules.base import Rules
    from ..sharding.parameters import ParamInfo


def fingerprint(
    seed: int, groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[ParamInfo]], own: Rules
) -> dict[str, object]:
    """What ranks must have in common from the start: seed, rules, hyperparameters, names, shapes and dtypes.

    ``own`` are the rules of groups that name none.
    """
    facts: dict[str, object] = {"seed": seed, "number of parameter groups": len(groups)}
    for i, (group, held) in enumerate(zip(groups, members, strict=True)):
        facts[f"rule of parameter group {i}"] = group.get(RULE)
        for key in options_of(rules_of(group, own)):
            value = group[key]
            facts[f"{key} of parameter group {i}"] = value.item() if isinstance(value, Tensor) else value
        for m in held:
            facts[f"parameter {m.name}"] = (m.shape, str(m.dtype), f"group {i}")
        facts[f"number of parameters in group {i}"] = len(held)
    return facts


def explain(process_group: dist.ProcessGroup | None) -> Callable[[str], str]:
    """What to do about a fact in which ranks differ, where it is not evident; a function of the fact's name."""
    if process_group is not None:
        advice = ". process_group may hold only ranks that train the same parameters"
    else:
        advice = (
            ". Ranks that train different parameters, such as the stages of a pipeline, each need "
            "process_group=GROUP, the group of the ranks that train the same parameters as they do"
        )
    return lambda fact: advice if fact.startswith(("parameter ", "number of parameters")) else ""
