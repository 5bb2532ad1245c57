"""The choice by structure: candidates are the weights of linear maps inside repeated blocks.

*Repeated block*: a child of ``nn.ModuleList`` or ``nn.Sequential``, a child whose name is a number (``nn.ModuleDict``
with numbered keys), or one of several children whose names differ in a number (``layer1``, ``layer2``). One layer in a
list is a block too. Wrappers (DDP, FSDP, ``torch.compile``, activation checkpointing) do not count as modules.

*Linear map*: ``nn.Linear`` and its subclasses; the input projections of ``nn.MultiheadAttention``; GPT-2's ``Conv1D``;
a class of one's own that says sizes which are those of its ``weight`` (``in_features`` and ``out_features``), or whose
code multiplies with a 2-D parameter (``source.py``). A 3-D parameter is a stack of matrices where the module says that
it holds experts, or multiplies with it.

*No candidates*: embeddings and what is tied to them; output heads; norms; convolutions; routers; biases; tables. The
first two are *of the vocabulary*, and taken where that is asked for.

A linear map that is a block by itself (``mm_projector.0``) is a candidate only in a model without larger blocks, or in
one list with them.

*Output head*: a linear map whose output nothing in the model takes up, and which

- gives as many numbers as the vocabulary or the classes that the model says it has, or
- is a block by itself at the end of a sequence of larger blocks, or
- is in something whose name says so by a whole component (``heads.0``, ``classifier.6``), outside of other blocks.

*Router*: a linear map beside experts that gives one number for each of them, or one for all (a gate).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from .tree import CONVOLUTION, LINEAR, OTHER, Tree, Use, parent_of, paths_above
from .verdict import Verdict, flat, says_head


def judge(model: nn.Module) -> dict[int, Verdict]:
    """What the structure of a model says about each of its parameters.

    Args:
        model: the model, wrapped, sharded or not, on any device.

    Returns:
        Verdicts by the ``id`` of the parameter, in the order of ``model.named_parameters()``.

    Raises:
        ValueError: for FSDP1's flat parameters.
    """
    tree = Tree(model)
    routers = _routers(tree)
    found = {}
    for key, uses in tree.uses.items():
        verdicts = [_verdict(tree, use, routers) for use in uses]
        refused = [verdict for verdict in verdicts if not verdict.candidate]
        first = verdicts[0]
        if refused and first.candidate:
            first = Verdict(first.name, first.shape, False, f"tied to {refused[0].name}: {refused[0].why}")
        elif refused and len(uses) > 1 and first.matrix:
            first = Verdict(first.name, first.shape, False, f"{first.why}; tied to {uses[1].name}")
        kinds = [verdict.why == "embedding" or verdict.why.startswith("output head") for verdict in refused]
        of_vocabulary = first.matrix and len(first.shape) == 2 and bool(kinds) and all(kinds)
        found[key] = replace(first, frozen=not tree.parameters[key].requires_grad, of_vocabulary=of_vocabulary)
    return found


def _verdict(tree: Tree, use: Use, routers: dict[str, str]) -> Verdict:
    is_convolution = use.why == CONVOLUTION
    plain = flat(use.name, use.shape)
    if plain is not None and not (is_convolution and len(use.shape) > 3):
        return plain
    if use.kind == OTHER:
        return Verdict(use.name, use.shape, False, use.why, matrix=not is_convolution)
    if tree.block_of(use.path) is None:
        why = _known_head(tree, use) or f"{use.why} outside of repeated blocks"
    elif use.name in routers:
        why = routers[use.name]
    elif tree.stands_alone(use.path) and not tree.is_among_large_blocks(use.path):
        why = f"{use.why} by itself, outside of the repeated blocks"
    else:
        why = _head(tree, use)
    return Verdict(use.name, use.shape, not why, why or f"{use.why} in a repeated block")


def _head(tree: Tree, use: Use) -> str:
    """Why a linear map in a block is an output head; "" if it is none."""
    if use.kind != LINEAR or tree.is_taken_up(use):
        return ""
    known = _known_head(tree, use)
    if known:
        return known
    if tree.stands_alone(use.path):
        return "output head: at the end of the repeated blocks"
    # Components down to the outermost block.
    for part, path in zip(reversed(use.path.split(".")), (use.path, *paths_above(use.path)), strict=False):
        if says_head(part) and tree.blocks.isdisjoint(paths_above(path)):
            return f"output head: at the end, in {part}"
    return ""


def _known_head(tree: Tree, use: Use) -> str:
    known = use.gives & tree.outputs
    if use.kind != LINEAR or not known or tree.is_taken_up(use):
        return ""
    return f"output head: gives the {max(known)} numbers of the vocabulary or classes"


def _routers(tree: Tree) -> dict[str, str]:
    """Names of the linear maps that route to experts, with the reason."""
    found = {}
    for experts, count, is_stack in _experts(tree):
        for beside in _beside(tree, experts):
            inside = list(tree.linear_in(beside))
            for use in inside:
                alone = len(inside) == 1
                if count in use.gives and ((alone and is_stack) or not tree.is_taken_up(use)):
                    found[use.name] = f"router of {count} experts"
                elif alone and 1 in use.gives and min(use.shape) == 1:
                    found[use.name] = "gate of experts"
    return found


def _beside(tree: Tree, experts: str) -> Iterator[str]:
    """Modules beside experts: in the module that holds them, and in those that hold that, up to the block."""
    yield from tree.children(experts)  # where a module holds both its stacks and a router
    path = experts
    while path and path not in tree.blocks:  # what stands beside a block is another block
        above = parent_of(path)
        yield from (child for child in tree.children(above) if child != path)
        if above in tree.blocks or parent_of(above) in tree.blocks:
            return
        path = above


def _experts(tree: Tree) -> Iterator[tuple[str, int, bool]]:
    """(path, how many, whether they are one stack) for each set of experts."""
    seen = set()
    for use in tree.stacks:
        if (use.path, use.shape[0]) not in seen:
            seen.add((use.path, use.shape[0]))
            yield use.path, use.shape[0], True
    for path, module in tree.modules.items():
        children = tree.children(path)
        # Only inside of a block: the layers of a model are a list of equal modules as well.
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(children) > 1
        if listed and tree.block_of(path) is not None:
            shapes = [sorted(use.shape for use in tree.linear_in(child)) for child in children]
            if shapes[0] and all(one == shapes[0] for one in shapes):
                yield path, len(children), False
