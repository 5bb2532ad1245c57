"""From verdicts to a choice: what is excluded, what the rank is too large for, what is told."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ..sharding.names import abbreviate, pattern_of
from . import by_module, by_name
from .verdict import Verdict

if TYPE_CHECKING:
    from .parameter import Parameter

logger = logging.getLogger("apollo_dist")

# A matrix with a larger share of the parameters is named in the log if AdamW takes it.
_LARGE = 0.01


@dataclass(frozen=True)
class Chosen:
    """A verdict with what became of it.

    Attributes:
        verdict: with the reason for what was chosen.
        low_rank: whether the parameter is low-rank; else AdamW takes it.
        too_small: whether it would be low-rank at a smaller rank.
    """

    verdict: Verdict
    low_rank: bool
    too_small: bool = False


Choice = Mapping[str, Chosen]


EMBEDDINGS = ("adamw", "low_rank")


def of_model(model: nn.Module, rank: int, exclude: str | None = None, embeddings: str = "adamw") -> dict[str, Chosen]:
    """The choice among all parameters of a model, by canonical name, in the model's order.

    Args:
        model: the model, wrapped, sharded or not.
        rank: r of the low-rank matrices.
        exclude: a regular expression; parameters whose canonical name it matches anywhere are left to AdamW.
        embeddings: "adamw", or "low_rank" to take embeddings and output heads as well.

    Raises:
        ValueError: if ``exclude`` is no regular expression, or for FSDP1's flat parameters.
    """
    verdicts = by_module.judge(model).values()
    return {v.name: _decide(v, rank, name_pattern(exclude), embeddings) for v in verdicts}


def of_names(
    shapes: Mapping[str, tuple[int, ...]], rank: int, exclude: str | None = None, embeddings: str = "adamw"
) -> dict[str, Chosen]:
    """The choice by names and shapes alone, where no model is known; see ``of_model``."""
    skip = name_pattern(exclude)
    return {name: _decide(verdict, rank, skip, embeddings) for name, verdict in by_name.judge(shapes).items()}


def choose(
    parameters: Iterable[Parameter],
    rank: int,
    *,
    model: nn.Module | None = None,
    exclude: str | None = None,
    embeddings: str = "adamw",
) -> dict[str, Chosen]:
    """The choice among parameters that an optimizer was given without a rank.

    The model decides wherever it is known. Names decide for parameters that it does not have, and where there is no
    model. Without names every matrix is low-rank.

    Args:
        parameters: all of them.
        rank: r of the low-rank matrices.
        model: whose parameters they are, where it is known.
        exclude: a regular expression of names to leave to AdamW.
        embeddings: as of ``of_model``.

    Returns:
        The choice by name.

    Raises:
        ValueError: for ``exclude`` without names.
    """
    parameters, skip = list(parameters), name_pattern(exclude)
    known = {} if model is None else by_module.judge(model)
    by_model_name = {verdict.name: verdict for verdict in known.values()}
    names = by_name.judge({p.name: p.shape for p in parameters if p.named})
    found = {}
    for p in parameters:
        verdict = known.get(p.key) or (by_model_name.get(p.name) if p.named else None) or names.get(p.name)
        if verdict is None and exclude is not None:
            raise ValueError(
                f"exclude={exclude!r} needs names, and the parameters came without: pass the model, (name, parameter) "
                "pairs, or a group without rank for what AdamW should take"
            )
        if verdict is None:
            is_matrix = len(p.shape) in (2, 3) and 0 not in p.shape
            verdict = Verdict(p.name, p.shape, is_matrix, "every matrix, for there are no names", is_matrix)
        verdict = replace(verdict, name=p.name, shape=p.shape, frozen=p.frozen)
        found[p.name] = _decide(verdict, rank, skip, embeddings)
    return found


def _decide(verdict: Verdict, rank: int, skip: re.Pattern[str] | None, embeddings: str) -> Chosen:
    if not verdict.candidate and not (verdict.of_vocabulary and embeddings == "low_rank"):
        return Chosen(verdict, False)
    if skip is not None and skip.search(verdict.name):
        return Chosen(replace(verdict, why=f"excluded by {skip.pattern!r}"), False)
    if rank > verdict.smaller_side:
        return Chosen(replace(verdict, why=f"rank {rank} > {verdict.smaller_side}, its smaller side"), False, True)
    return Chosen(verdict, True)


def low_rank_names(choice: Choice) -> set[str]:
    """Names of the low-rank parameters."""
    return {name for name, chosen in choice.items() if chosen.low_rank}


def left_to_adamw(choice: Choice, rank: int) -> str:
    """One line for the log about matrices that AdamW takes though they are too small or large; "" if there are none.

    Frozen parameters are left out.

    Args:
        choice: of the library, not what groups with a rank of their own say.
        rank: that the choice was made with.
    """
    said = []
    choice = {name: chosen for name, chosen in choice.items() if not chosen.verdict.frozen}
    small = [chosen.verdict for chosen in choice.values() if chosen.too_small]
    if small:
        side = min(v.smaller_side for v in small)
        names = abbreviate(v.name for v in small)
        said.append(f"rank {rank} is larger than a side of {names}: rank={side} would take all of these")
    total = sum(chosen.verdict.numel for chosen in choice.values())
    shares: dict[tuple[str, str], list[Verdict]] = {}
    for chosen in choice.values():
        if chosen.verdict.matrix and not chosen.low_rank and not chosen.too_small:
            shares.setdefault((pattern_of(chosen.verdict.name), chosen.verdict.why), []).append(chosen.verdict)
    large = []
    for (pattern, why), verdicts in shares.items():
        share = sum(v.numel for v in verdicts) / max(total, 1)
        if share > _LARGE:
            count = f" ({len(verdicts)})" if len(verdicts) > 1 else ""
            large.append(f"{pattern}{count}, {100 * share:.1f} % of the elements: {why}")
    if large:
        said.append("; ".join(large))
    if not said:
        return ""
    return (
        f"AdamW takes: {'; '.join(said)}. To change what is low-rank: rank=, exclude='regex', or parameter groups with "
        "a rank of their own. apollo_dist.describe(model) shows every parameter"
    )


def tell(choice: Choice, rank: int) -> None:
    """Log ``left_to_adamw`` on the first rank: as a warning where the rank is too large for a matrix."""
    line = left_to_adamw(choice, rank)
    if line and (not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0):
        is_surprise = any(chosen.too_small and not chosen.verdict.frozen for chosen in choice.values())
        logger.log(logging.WARNING if is_surprise else logging.INFO, "%s", line)


def check_any(choice: Choice, what: str, rank: int) -> None:
    """Raise ValueError if nothing is low-rank: the optimizer would be AdamW without a word.

    Frozen matrices count, since they may be trained later; but not where all that is trained at present is too small
    (LoRA's A and B in a frozen model).

    Args:
        choice: of all parameters.
        what: they are of, for the message.
        rank: that the choice was made with.
    """
    trained = [chosen for chosen in choice.values() if not chosen.verdict.frozen]
    small = [chosen.verdict for chosen in trained if chosen.too_small]
    if any(chosen.low_rank for chosen in (trained if small else choice.values())):
        return
    if small:
        largest = max(small, key=lambda v: v.smaller_side)
        raise ValueError(
            f"no low-rank matrix found in {what}: APOLLO would silently be AdamW. rank {rank} is larger than "
            f"{largest.name} of shape {largest.shape} and all other candidates allow "
            f"({abbreviate(v.name for v in small)}). Use rank <= {largest.smaller_side}"
        )
    raise ValueError(
        f"no low-rank matrix found in {what}: APOLLO would silently be AdamW. It looks for weights of linear maps "
        "inside repeated blocks (such as layers.0.mlp.up_proj.weight). Give the matrices a parameter group with a "
        "rank: APOLLO([{'params': matrices, 'rank': 256}, {'params': others}])"
    )


def check_embeddings(embeddings: Any) -> None:
    """Raise ValueError if ``embeddings`` is none of ``EMBEDDINGS``."""
    if type(embeddings) is not str or embeddings not in EMBEDDINGS:
        raise ValueError(f'embeddings must be "adamw" or "low_rank", got {embeddings!r}')


def name_pattern(exclude: str | None) -> re.Pattern[str] | None:
    """``exclude`` compiled; ValueError if it is no regular expression."""
    try:
        return re.compile(exclude) if exclude else None
    except (re.error, TypeError) as error:
        raise ValueError(f"exclude={exclude!r} is not a regular expression: {error}") from None
