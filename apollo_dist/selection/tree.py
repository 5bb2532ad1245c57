"""A model as the rule sees it: modules by canonical path, repeated blocks, and what each parameter is in its module."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..sharding import fsdp1
from ..sharding.names import canonical_name
from ..sharding.parameters import logical_shape
from . import source

LINEAR, STACK, OTHER = "linear", "stack", "other"
CONVOLUTION = "convolution"
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
# Attributes in which classes of linear maps say what they take and give.
_SIZES = (("in_features", "out_features"), ("input_size", "output_size"), ("in_dim", "out_dim"), ("nx", "nf"))
# Attributes in which models and their configurations say how many numbers they end with.
_OUTPUTS = ("vocab_size", "num_labels", "num_classes")
_NUMBERED = re.compile(r"(.*?)_?(\d+)")


@dataclass(frozen=True)
class Use:
    """A parameter in the module that holds it.

    Attributes:
        name: canonical name.
        path: canonical path of the module.
        shape: logical shape.
        kind: a linear map's weight, a stack of them, or something else.
        why: what it is, in words.
        takes, gives: sizes of the vectors that a linear map takes and gives; both sides where the class does not say.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    kind: str
    why: str
    takes: frozenset[int] = frozenset()
    gives: frozenset[int] = frozenset()


class Tree:
    """Modules and parameters of a model, wrapped or not.

    Args:
        model: the model.

    Raises:
        ValueError: for FSDP1's flat parameters, in which matrices cannot be told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        fsdp1.register(model)
        self.modules: dict[str, nn.Module] = {}
        # By id of the parameter: several uses where it is tied.
        self.uses: dict[int, list[Use]] = {}
        self.parameters: dict[int, Tensor] = {}
        held: list[tuple[str, str, Tensor]] = []
        for prefix, module in model.named_modules():
            # Wrappers come before what they wrap, which then takes their place.
            path = canonical_name(f"{prefix}.x")[:-2] if prefix else ""
            self.modules[path] = module
            for leaf, parameter in module.named_parameters(recurse=False):
                name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
                fsdp1.check(name, parameter)
                held.append((name, path, parameter))
        for name, path, parameter in held:
            use = _use(name, path, self.modules[path], logical_shape(parameter))
            self.uses.setdefault(id(parameter), []).append(use)
            self.parameters[id(parameter)] = parameter
        self._children: dict[str, list[str]] = {}
        for path in self.modules:
            if path:
                self._children.setdefault(parent_of(path), []).append(path)
        self._linear: dict[str, list[Use]] = {}
        self.stacks = [use for use in self.all_uses() if use.kind == STACK]
        for use in self.all_uses():
            if use.kind == LINEAR:
                self._linear.setdefault(use.path, []).append(use)
        self.taken = Counter(size for use in self.all_uses() for size in use.takes)
        self.blocks = {path for path in self.modules if path and self._is_numbered(path)}
        # Blocks with linear maps below them, not of one linear map by itself.
        below = {path for use in self.all_uses() if use.kind != OTHER for path in paths_above(use.path)}
        self.large_blocks = self.blocks & below
        self.outputs = self._outputs()

    def all_uses(self) -> Iterator[Use]:
        """Every use of every parameter."""
        for uses in self.uses.values():
            yield from uses

    def children(self, path: str) -> list[str]:
        """Paths of a module's children."""
        return self._children.get(path, [])

    def linear_in(self, path: str) -> Iterator[Use]:
        """The linear maps of a module and of everything below it."""
        yield from self._linear.get(path, ())
        for child in self.children(path):
            yield from self.linear_in(child)

    def block_of(self, path: str) -> str | None:
        """The innermost repeated block that a module is in, or is itself."""
        return next((above for above in (path, *paths_above(path)) if above in self.blocks), None)

    def stands_alone(self, path: str) -> bool:
        """Whether a module is a block by itself, outside of larger blocks, in a model that has such."""
        above = (path, *paths_above(path))
        return path in self.blocks and bool(self.large_blocks) and self.large_blocks.isdisjoint(above)

    def is_among_large_blocks(self, path: str) -> bool:
        """Whether a module stands in a list or sequence together with larger blocks."""
        return any(other in self.large_blocks for other in self.children(parent_of(path)))

    def is_taken_up(self, use: Use) -> bool:
        """Whether anything in the model takes what a linear map gives.

        Another map that takes vectors of this size does, and so does an attention product with a map of the same
        shape beside it (queries and keys).
        """
        if use.path not in self.blocks:
            beside = (path for path in self.children(parent_of(use.path)) if path != use.path)
            if any(other.shape == use.shape for path in beside for other in self._linear.get(path, ())):
                return True
        return all(self.taken[size] > (size in use.takes) for size in use.gives)

    def _is_numbered(self, path: str) -> bool:
        """Whether a module is one of several: in a list or sequence, or by a number in its name.

        ``layer1`` counts only beside ``layer2``, and only if it holds modules of its own: ``fc1`` is no block.
        """
        above, key = parent_of(path), path.rpartition(".")[2]
        parent = self.modules.get(above)
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) or key.isdigit():
            return True
        stem = _NUMBERED.fullmatch(key)
        if stem is None or not any(self.children(path)):
            return False
        beside = (_NUMBERED.fullmatch(other.rpartition(".")[2]) for other in self.children(above) if other != path)
        return any(other is not None and other[1] == stem[1] for other in beside)

    def _outputs(self) -> set[int]:
        """Sizes of the vocabulary and of classes, as far as the model says them."""
        said: set[object] = set()
        tables = [0]
        for module in self.modules.values():
            for owner in (module, getattr(module, "config", None)):
                said |= {getattr(owner, key, None) for key in _OUTPUTS if isinstance(getattr(owner, key, None), int)}
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                tables.append(module.num_embeddings)
        # Of several tables the vocabulary's is the largest; the others hold positions and types.
        return {size for size in (*said, max(tables)) if isinstance(size, int) and size > 1}


def parent_of(path: str) -> str:
    """The path of the module that holds a module."""
    return path.rpartition(".")[0]


def paths_above(path: str) -> list[str]:
    """The paths of all modules that a module is in, from the inside out; the root's is ""."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)] if path else []


def _use(name: str, path: str, module: nn.Module, shape: tuple[int, ...]) -> Use:
    """What a parameter is in the module that holds it."""
    leaf = name.rpartition(".")[2]

    def linear(why: str, takes: int, gives: int) -> Use:
        return Use(name, path, shape, LINEAR, why, frozenset({takes}), frozenset({gives}))

    def other(why: str, *takes: int) -> Use:
        return Use(name, path, shape, OTHER, why, frozenset(takes))

    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return other("embedding")
    if isinstance(module, nn.modules.conv._ConvNd):
        return other(CONVOLUTION, *([module.in_channels] if leaf == "weight" else []))
    if isinstance(module, _NORMS):
        return other("norm")
    if len(shape) not in (2, 3) or 0 in shape or math.prod(shape) == 0:
        return other("not a matrix")
    if isinstance(module, nn.MultiheadAttention) and leaf in _ATTENTION_WEIGHTS:
        return linear("attention's input projection", shape[1], shape[0])
    if isinstance(module, nn.Linear) and leaf == "weight" and len(shape) == 2:
        return linear("linear map", shape[1], shape[0])
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and leaf == "weight" and len(shape) == 2:
        return linear("linear map (Conv1D)", shape[0], shape[1])
    if isinstance(module, nn.RNNBase):
        return other("recurrent weights", shape[-1])
    return _own(name, path, module, shape, leaf)


def _own(name: str, path: str, module: nn.Module, shape: tuple[int, ...], leaf: str) -> Use:
    """A parameter of a class that torch does not know."""
    cls: Any = type(module)
    kind = cls.__name__
    uses = source.uses_of(cls).get(leaf, frozenset())
    sides = frozenset(shape[-2:])
    if "bias" in leaf.lower().split("_"):
        return Use(name, path, shape, OTHER, "bias")
    if len(shape) == 3:
        stacked = _holds_experts(module, path, shape[0]) or source.MULTIPLIED in uses
        if not stacked or source.CONVOLVED in uses:
            return Use(name, path, shape, OTHER, f"three dimensions, and {kind} is no stack of matrices")
        return Use(name, path, shape, STACK, f"stack of {shape[0]} matrices (experts)", sides, sides)
    for given, made in _SIZES:
        takes, gives = getattr(module, given, None), getattr(module, made, None)
        if not isinstance(takes, int) or not isinstance(gives, int):
            continue
        if leaf == "weight" and shape in ((gives, takes), (takes, gives)):
            return Use(name, path, shape, LINEAR, f"linear map ({kind})", frozenset({takes}), frozenset({gives}))
    if source.LOOKED_UP in uses:
        return Use(name, path, shape, OTHER, f"table in which {kind} looks up rows")
    if source.MULTIPLIED in uses or source.CONTRACTED in uses:
        return Use(name, path, shape, LINEAR, f"linear map ({kind})", sides, sides)
    return Use(name, path, shape, OTHER, f"{kind} does not say that it multiplies with it")


def _holds_experts(module: nn.Module, path: str, count: int) -> bool:
    """Whether a module is one of experts: by its class, its path, or an attribute that counts ``count`` of them."""
    classes = (kind.__name__.lower() for kind in type(module).__mro__ if issubclass(kind, nn.Module))
    return (
        any("expert" in kind for kind in classes)
        or any(part in ("expert", "experts") for part in path.lower().split("."))
        or any("expert" in key and isinstance(value, int) and value == count for key, value in vars(module).items())
    )
