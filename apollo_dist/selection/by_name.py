"""The choice by name and shape, where no model is known.

A candidate is a matrix (or a stack of matrices) in a numbered block (``layers.0.mlp.up_proj.weight``), unless its name
says that it is something else. Words count only as whole components of the name: ``multi_head_attention`` is no head,
``vision_embed_tokens`` no embedding, ``lm_out_heads.0`` is a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .verdict import Verdict, flat, says_head

_BLOCK = re.compile(r"\d+|(.*_)?(layer|block|stage|resblock)s?_?\d+", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"((tok|token|word|pos|position|positional|token_type|segment|patch|time|timestep|text|visual)_)?"
    r"(embed|embeds|embedding|embeddings|embedder)|embed_(in|out|tokens|positions|tok|pos|layer)|wte|wpe|tok_embeddings"
    r"|relative_attention_bias|relative_position_bias_table|rel_pos(_[hw])?|pos_emb|position_bias",
    re.IGNORECASE,
)
_NORM = re.compile(r"(.*_)?(layer|rms|group|batch)?norm_?\d*|norm_[a-z]+|ln(_?\d+|_[a-z]+)?", re.IGNORECASE)
_CONVOLUTION = re.compile(r"(.*_)?(dw|pw)?conv(\d+d?)?", re.IGNORECASE)
_ROUTER = re.compile(r"(.*_)?router|shared_expert_gate", re.IGNORECASE)
_EXPERTS = re.compile(r"(.*_)?experts?", re.IGNORECASE)
# Last components of parameters that are no weights of linear maps.
_TABLE = re.compile(
    r"(.*_)?bias(_.*)?|A_log|(.*_)?(gamma|beta|scale|mask|token|tokens|table|state)|time_mix_.*|lora_embedding_[AB]",
    re.IGNORECASE,
)


OUTSIDE = "outside of numbered blocks"


def says_embedding(component: str) -> bool:
    """Whether a component of a name says that it is an embedding."""
    return _EMBEDDING.fullmatch(component) is not None


def judge(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Verdict]:
    """What names and shapes say about parameters.

    Args:
        shapes: canonical name -> logical shape, of all parameters that are known: experts are seen beside their router.

    Returns:
        Verdicts by name.
    """
    experts = _expert_counts(shapes)
    return {name: _verdict(name, tuple(shape), experts) for name, shape in shapes.items()}


def _verdict(name: str, shape: tuple[int, ...], experts: Mapping[str, set[int]]) -> Verdict:
    plain = flat(name, shape)
    if plain is not None:
        return plain
    parts = name.split(".")
    why = _refused(parts, shape, experts)
    matrix = why != "convolution"
    of_vocabulary = why in ("embedding", "output head")
    if why == OUTSIDE:
        of_vocabulary = any(says_embedding(part) for part in parts) or any(map(says_head, parts[:-1]))
    of_vocabulary = of_vocabulary and matrix and len(shape) == 2
    why_not_refused = "matrix in a numbered block, by its name"
    return Verdict(name, shape, not why, why or why_not_refused, matrix=matrix, of_vocabulary=of_vocabulary)


def _refused(parts: list[str], shape: tuple[int, ...], experts: Mapping[str, set[int]]) -> str:
    """Why a matrix is no candidate; "" if it is one."""
    first = next((i for i, part in enumerate(parts) if _BLOCK.fullmatch(part)), None)
    if first is None:
        return OUTSIDE
    leaf, modules = parts[-1], parts[:-1]
    # The module that holds it: the last component that is no number.
    owner = next((part for part in reversed(modules) if not part.isdigit()), "")
    if _TABLE.fullmatch(leaf):
        return f"{leaf} is no weight of a linear map"
    if any(_EMBEDDING.fullmatch(part) for part in (*parts[:first], owner, leaf)):
        return "embedding"
    if any(says_head(part) for part in (*parts[:first], owner)):
        return "output head"
    if _NORM.fullmatch(owner):
        return "norm"
    if _CONVOLUTION.fullmatch(owner):
        return "convolution"
    if _is_router(modules, owner, shape, experts):
        return "router"
    if len(shape) == 3 and leaf != "weight" and not any(_EXPERTS.fullmatch(part) for part in parts):
        return "three dimensions, and no experts by its name"
    return ""


def _is_router(modules: list[str], owner: str, shape: tuple[int, ...], experts: Mapping[str, set[int]]) -> bool:
    if _ROUTER.fullmatch(owner) or (len(modules) > 1 and _ROUTER.fullmatch(modules[-2])):
        return True
    return len(shape) == 2 and shape[0] in experts.get(".".join(modules[:-1]), ())


def _expert_counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, set[int]]:
    """For each module that holds experts how many: ``layers.0.mlp`` -> {8}, from stacks or numbered experts."""
    counts: dict[str, set[int]] = {}
    numbers: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        for i, above in _experts_in(parts):
            if len(shape) == 3:
                counts.setdefault(above, set()).add(shape[0])
            elif parts[i + 1].isdigit():
                numbers.setdefault(above, set()).add(parts[i + 1])
    for above, found in numbers.items():
        counts.setdefault(above, set()).add(len(found))
    return counts


def _experts_in(parts: list[str]) -> Iterable[tuple[int, str]]:
    return ((i, ".".join(parts[:i])) for i, part in enumerate(parts[:-1]) if _EXPERTS.fullmatch(part))
