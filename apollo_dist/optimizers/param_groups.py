"""Which parameters are low-rank: selection by name, parameter groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..sharding import detect, fsdp1
from ..sharding.local_shard import canonical_name, matrices
from .options import COMMON, OPTIONS, check_known

# Set by the optimizer on groups that come without a rank when no group has one: members are chosen by name.
CHOOSE = "choose_by_name"

_NOT_IN_BLOCKS = re.compile(r"embed|wte|wpe|lm_head|(^|[._])head($|[._])|norm", re.IGNORECASE)


@dataclass(frozen=True)
class Member:
    """A parameter as it was given: canonical name (``param_3`` where none was), logical shape, dtype, whether named.

    Members with the same ``part`` step together: their matrices share a plan and its two collectives.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    named: bool
    part: int = 0


def member(index: int, name: str | None, tensor: torch.Tensor) -> Member:
    """The member that a parameter becomes.

    Args:
        index: its place among all parameters, which names it where ``name`` is None.
        name: as given, wrapped or not.
        tensor: the parameter.

    Raises:
        ValueError: for complex or integer parameters, and for those of FSDP1 whose model was never seen.
    """
    named = name is not None
    name = canonical_name(name) if name is not None else f"param_{index}"
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; APOLLO optimizes real floating-point parameters only")
    fsdp1.check(name, tensor)
    return Member(name, detect.logical_shape(tensor), tensor.dtype, named)


def choose(members: Iterable[Member], model: nn.Module | None = None, exclude: str | None = None) -> set[str]:
    """The low-rank members among parameters that came without a rank.

    With a model (the engine's, at the first step) as ``param_groups`` chooses; else by name and shape; without names
    every matrix.

    Args:
        members: the parameters.
        model: whose parameters they are, where it is known.
        exclude: a regular expression of names to leave to AdamW.

    Raises:
        ValueError: if there is none, or for ``exclude`` without names.
    """
    members = list(members)
    if model is not None:
        chosen = low_rank_names(model, exclude) & {m.name for m in members}
    elif all(m.named for m in members):
        skip = name_pattern(exclude)
        chosen = {m.name for m in members if is_low_rank_name(m.name, m.shape) and not (skip and skip.search(m.name))}
    elif exclude is not None:
        raise ValueError(
            f"exclude={exclude!r} needs names, and the parameters came without: pass the model, (name, parameter) "
            "pairs, or a group without rank for what AdamW should take"
        )
    else:
        chosen = {m.name for m in members if len(m.shape) in (2, 3) and 0 not in m.shape}
    if not chosen:
        raise ValueError(no_matrix_message(f"{len(members)} parameters"))
    return chosen


def name_pattern(exclude: str | None) -> re.Pattern[str] | None:
    """``exclude`` compiled; ValueError if it is no regular expression."""
    try:
        return re.compile(exclude) if exclude else None
    except (re.error, TypeError) as error:
        raise ValueError(f"exclude={exclude!r} is not a regular expression: {error}") from None


def abbreviate(names: Iterable[str], limit: int = 12) -> str:
    """Names for the log, numbers as ``*``, counted: ``layers.*.mlp.up_proj.weight (24), ...``."""
    counts = Counter(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f" and {len(counts) - limit} more kinds" if len(counts) > limit else "")


def check_matrix(name: str, shape: tuple[int, ...], rank: int) -> None:
    """Raise ValueError unless a parameter of this shape can be low-rank at this rank."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"{name} of shape {shape} is in a group with rank={rank}, but only matrices (m, n) and stacks of them "
            "(E, m, n) can be low-rank: move it to a group without rank, which takes AdamW"
        )
    _, m, n = matrices(shape)
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} is larger than {name} of shape {shape}: its low-rank state would be larger than AdamW's. "
            f"Use rank <= {min(m, n)}, or give this matrix a group of its own with a smaller rank, "
            "or leave it to AdamW (a group without rank; exclude=... in param_groups)"
        )


def _inside_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def is_low_rank_name(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter looks like an attention or MLP weight, judged by name and shape alone.

    True for 2-D (and 3-D expert) weights inside a numbered block whose name says neither embedding, head nor norm.
    """
    if len(shape) not in (2, 3) or 0 in shape or not _inside_block(name) or _NOT_IN_BLOCKS.search(name):
        return False
    return name.rsplit(".", 1)[-1] != "bias"


def low_rank_names(model: nn.Module, exclude: str | None = None) -> set[str]:
    """Canonical names of the parameters of ``model`` that APOLLO treats as low-rank.

    These are the weights of ``nn.Linear`` (and Hugging Face's ``Conv1D``) modules inside numbered blocks, and 3-D
    expert weights there; never embeddings, the head, norms, biases or convolutions.

    Args:
        model: the model, wrapped or not.
        exclude: a regular expression; parameters whose canonical name it matches anywhere are left to AdamW.
    """
    fsdp1.register(model)
    skip = name_pattern(exclude)
    chosen = set()
    for prefix, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        for leaf, parameter in module.named_parameters(recurse=False):
            name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
            fsdp1.check(name, parameter)
            shape = detect.logical_shape(parameter)
            experts = len(shape) == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if (linear or experts) and is_low_rank_name(name, shape) and not (skip and skip.search(name)):
                chosen.add(name)
    return chosen


def param_groups(
    model: nn.Module, rank: int = 256, *, exclude: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Two parameter groups for ``APOLLO``: attention and MLP matrices low-rank, everything else AdamW, with names.

    Args:
        model: the model, wrapped or not. Parameters that are frozen at present are in the groups as well: they have no
            state, and train once they require a gradient.
        rank: r of the low-rank group.
        exclude: a regular expression; matching names go to AdamW.
        options: further options of both groups (lr, betas, eps, weight_decay, maximize) or of the low-rank group
            (scale, scale_type, update_proj_gap, proj, proj_type, scale_front, disable_nl).

    Returns:
        Groups whose ``params`` are (name, parameter) pairs.

    Raises:
        ValueError: for an unknown option, or if no matrix is found.
    """
    check_known(options, [key for key in OPTIONS if key != "rank"], "option")
    chosen = low_rank_names(model, exclude)
    low: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        # One that is frozen has no state until it trains; of integers (quantized) it never does.
        if not (parameter.requires_grad or parameter.is_floating_point()):
            continue
        name, small = canonical_name(name), False
        if name in chosen and not parameter.requires_grad:  # the base of LoRA, which need not have this rank
            small = rank > min(matrices(detect.logical_shape(parameter))[1:])
        (low if name in chosen and not small else rest).append((name, parameter))
    if not low:
        trainable = sum(parameter.requires_grad for _, parameter in rest)
        raise ValueError(no_matrix_message(f"{type(model).__name__} with {trainable} trainable parameters"))
    groups: list[dict[str, Any]] = [{"params": low, "rank": rank, **options}]
    if rest:
        groups.append({"params": rest, **{key: value for key, value in options.items() if key in COMMON}})
    return groups


def no_matrix_message(what: str) -> str:
    """The error for a choice by name that found nothing."""
    return (
        f"no low-rank matrix found in {what}: APOLLO would silently be AdamW. By name it looks for trainable nn.Linear "
        "weights inside numbered blocks (such as layers.0.mlp.up_proj.weight). Give the matrices a parameter group "
        "with a rank: APOLLO([{'params': matrices, 'rank': 256}, {'params': others}])"
    )


def split_params(params: Any) -> list[tuple[str | None, torch.Tensor]]:
    """A group's ``params`` (tensors, or (name, tensor) pairs) as pairs; None where there is no name."""
    if isinstance(params, torch.Tensor):
        return [(None, params)]
    if isinstance(params, (set, frozenset)):
        raise ValueError("parameters must come in an order that is the same on every rank; a set has none")
    pairs: list[tuple[str | None, torch.Tensor]] = []
    for item in params:
        name, tensor = item if isinstance(item, tuple) else (None, item)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"parameters must be tensors or (name, tensor) pairs, got {type(tensor).__name__}")
        pairs.append((name, tensor))
    return pairs
