"""What each parameter is in its model, for rules that treat embeddings, heads, queries and keys differently."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ..rules.roles import BIAS, EMBEDDING, FUSED, HEAD, KEY, LINEAR, NORM, OTHER, QUERY, UNKNOWN, VALUE, Role
from ..sharding.names import abbreviate
from . import by_module, by_name
from .tree import OTHER as NO_MAP
from .tree import Tree, Use, paths_above
from .verdict import says_head

if TYPE_CHECKING:
    from .parameter import Parameter

logger = logging.getLogger("apollo_dist")

_ATTENTION = {
    QUERY: frozenset({"q_proj", "wq", "query", "q", "q_lin", "to_q", "q_proj_weight"}),
    KEY: frozenset({"k_proj", "wk", "key", "k", "k_lin", "to_k", "k_proj_weight"}),
    VALUE: frozenset({"v_proj", "wv", "value", "v", "v_lin", "to_v", "v_proj_weight"}),
    FUSED: frozenset({"qkv_proj", "qkv", "wqkv", "to_qkv", "c_attn", "query_key_value", "in_proj_weight"}),
}
# Attributes in which attention modules and configurations say how many rows a head has.
_HEAD_DIM = ("head_dim", "attention_head_size", "kv_channels", "d_kv")


def of_model(model: nn.Module) -> dict[str, Role]:
    """The roles of all parameters of a model, by canonical name; a tied one has that of its first name.

    Args:
        model: the model, wrapped, sharded or not.

    Raises:
        ValueError: for FSDP1's flat parameters.
    """
    tree, heads = Tree(model), set()
    for key, verdict in by_module.judge(model).items():
        if verdict.why.startswith("output head"):
            heads.add(key)
    return {uses[0].name: _role(tree, uses[0], key in heads) for key, uses in tree.uses.items()}


def of_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Role]:
    """The same by names and shapes alone, where no model is known."""
    return {name: Role(_kind_by_name(name, shape)) for name, shape in shapes.items()}


def _role(tree: Tree, use: Use, is_head: bool) -> Role:
    leaf = use.name.rpartition(".")[2]
    if "bias" in leaf.lower().split("_"):
        return Role(BIAS)
    if len(use.shape) < 2 or use.why == "norm":
        return Role(NORM)
    if len(use.shape) == 2 and (use.why == "embedding" or use.why.startswith("table in which")):
        return Role(EMBEDDING)
    if use.kind == NO_MAP:
        return Role(OTHER)
    if is_head:
        return Role(HEAD)
    kind = _attention(use.name)
    return Role(kind, None if kind == LINEAR else _head_dim(tree, use))


def _attention(name: str) -> str:
    """What a linear map is by the name of its module, or its own."""
    for part in name.split(".")[-2:]:
        for kind, names in _ATTENTION.items():
            if part.lower() in names:
                return kind
    return LINEAR


def _head_dim(tree: Tree, use: Use) -> int | None:
    """How many rows a head of a projection in attention has, as the modules that it is in say, from the inside out."""
    if use.shape[-2] not in use.gives or "Conv1D" in use.why:  # heads are columns there
        return None
    above = [tree.modules[path] for path in paths_above(use.path) if path in tree.modules]
    for module in above:
        said = _said(module) or _said(getattr(module, "config", None))
        if said is not None and use.shape[-2] % said == 0:
            return said
    return None


def _said(owner: Any) -> int | None:
    for key in _HEAD_DIM:
        if isinstance(getattr(owner, key, None), int):
            return int(getattr(owner, key)) or None
    # nn.MultiheadAttention and configurations of transformers say how many heads there are.
    width = next((getattr(owner, k) for k in ("embed_dim", "hidden_size", "n_embd") if hasattr(owner, k)), None)
    heads = next((getattr(owner, k) for k in ("num_heads", "num_attention_heads", "n_head") if hasattr(owner, k)), None)
    if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0:
        return width // heads
    return None


def _kind_by_name(name: str, shape: tuple[int, ...]) -> str:
    parts = name.split(".")
    if "bias" in parts[-1].lower().split("_"):
        return BIAS
    if len(shape) < 2:
        return NORM
    verdict = by_name.judge({name: shape})[name]
    if verdict.why == "embedding" or any(by_name.says_embedding(part) for part in parts):
        return EMBEDDING if len(shape) == 2 else OTHER
    if verdict.why == "output head" or any(map(says_head, parts[:-1])):
        return HEAD
    if len(shape) > 3 or verdict.why in ("convolution", "norm") or verdict.why.endswith("no weight of a linear map"):
        return OTHER
    return _attention(name)


class KeptRoles:
    """The roles of an optimizer's parameters: each is decided once, and stays so."""

    def __init__(self) -> None:
        self._kept: dict[str, Role] = {}

    def of(self, name: str) -> Role:
        """The role of a parameter; unknown where it is not decided."""
        return self._kept.get(name, Role(UNKNOWN))

    def decide(self, parameters: Iterable[Parameter], module: nn.Module | None, what: str) -> None:
        """Decide on parameters that are not decided yet; the log then says what they are.

        Args:
            parameters: all of them.
            module: whose parameters they are, where it is known.
            what: asks, for the log.
        """
        new = [p for p in parameters if p.name not in self._kept]
        if not new:
            return
        found = self.expected(new, module)
        self._kept |= found
        if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
            _tell({p.name: found[p.name] for p in new}, what)

    def expected(self, parameters: Iterable[Parameter], module: nn.Module | None) -> dict[str, Role]:
        """What ``decide`` would decide on, with what is decided."""
        parameters = list(parameters)
        known = {} if module is None else of_model(module)
        names = of_names({p.name: p.shape for p in parameters if p.named and p.name not in known})
        found = {p.name: known.get(p.name) or names.get(p.name) or _by_shape(p) for p in parameters}
        return found | {name: role for name, role in self._kept.items() if name in found}


def _by_shape(p: Parameter) -> Role:
    return Role(NORM if len(p.shape) < 2 else UNKNOWN)


def _tell(roles: Mapping[str, Role], what: str) -> None:
    """One log line: the parameters of each special role."""
    said = []
    for kind in (EMBEDDING, HEAD, QUERY, KEY, UNKNOWN):
        names = [name for name, role in roles.items() if role.kind == kind]
        if names:
            said.append(f"{kind}: {abbreviate(names)}")
    level = logging.WARNING if any(role.kind == UNKNOWN for role in roles.values()) else logging.INFO
    hint = ". What is unknown is taken for a linear map; pass the model, or names" if level == logging.WARNING else ""
    logger.log(level, "%s takes parameters for: %s%s", what, "; ".join(said) or "linear maps and norms", hint)
