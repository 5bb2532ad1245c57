"""Parameters as they are given: groups, names, and what is known of each."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..rules.base import Rules
from ..rules.groups import options_of
from ..rules.registry import RULE, rules_named
from ..selection.choice import check_any, check_embeddings, of_model, tell
from .options import check_known
from .parameters import named_parameters


def param_groups(
    model: nn.Module,
    rank: int | None = None,
    *,
    rule: str = "apollo",
    exclude: str | None = None,
    embeddings: str = "adamw",
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups of a model's parameters, with names.

    For APOLLO, GaLore and Fira two: attention and MLP matrices low-rank, everything else AdamW. The choice is that of
    ``APOLLO(model)``; ``apollo_dist.describe(model)`` prints it with the reasons. For any other rule one. Groups of
    other rules than APOLLO's name their rule.

    Args:
        model: the model, wrapped or not. Parameters that are frozen at present are in the groups as well: they have no
            state, and train once they require a gradient.
        rank: r of the low-rank group, by default 256. Matrices with a smaller side go to AdamW, and the log names them.
        rule: the rule's name, such as "scale".
        exclude: a regular expression; matching names go to AdamW. For low-rank rules only.
        embeddings: "low_rank" takes embeddings and output heads as well. For low-rank rules only.
        options: further options of the groups: lr, weight_decay, maximize, and what the rule has (for APOLLO betas and
            eps, and of the low-rank group scale, scale_type, update_proj_gap, proj, proj_type, scale_front,
            disable_nl).

    Returns:
        Groups whose ``params`` are (name, parameter) pairs.

    Raises:
        ValueError: for an unknown option or rule, or if no matrix is found for APOLLO.
    """
    rules = rules_named(rule)
    if rules.matrix is not None and rules.matrix.chosen:
        groups = chosen_groups(model, rules, 256 if rank is None else rank, exclude, embeddings, options)
        # Groups of APOLLO's name no rule, as groups for apollo-torch do.
        return groups if rule == "apollo" else [{RULE: rule, "rank": None, **group} for group in groups]
    check_known(options, options_of(rules), "option")
    if rank is not None or exclude is not None or embeddings != "adamw":
        raise ValueError(f"rank, exclude and embeddings are for low-rank matrices, which rule={rule!r} does not have")
    return [{"params": named_parameters(model), RULE: rule, **options}]


def chosen_groups(
    model: nn.Module, rules: Rules, rank: int, exclude: str | None, embeddings: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The groups of rules whose matrices are chosen: low-rank ones, and the others; see ``param_groups``."""
    check_known(options, [key for key in options_of(rules) if key != "rank"], "option")
    check_embeddings(embeddings)
    choice = of_model(model, rank, exclude, embeddings)
    low: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters(model):
        (low if choice[name].low_rank else rest).append((name, parameter))
    told = {name: choice[name] for name, _ in (*low, *rest)}
    trainable = sum(parameter.requires_grad for _, parameter in (*low, *rest))
    check_any(told, f"{type(model).__name__} with {trainable} trainable parameters", rank)
    tell(told, rank)
    groups: list[dict[str, Any]] = [{"params": low, "rank": rank, **options}]
    if rest:
        shared = options_of(Rules(None, rules.element))
        groups.append({"params": rest, **{key: value for key, value in options.items() if key in shared}})
    return groups
