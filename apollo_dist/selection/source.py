"""How a module's own code uses its parameters: multiplied with, looked up by index, or neither.

A module class of one's own says nothing about its parameters, and a 2-D parameter may be the weight of a linear map, a
table of embeddings, or the gains of several norms. What tells them apart is what the class does with it, so the source
of its methods is read. ``x @ self.weight.T`` and ``F.linear(x, self.weight)`` multiply, ``self.weight[index]`` and
``F.embedding(index, self.weight)`` look up, ``x * self.weight`` does neither.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator

from torch import nn

MULTIPLIED = "multiplied"
CONTRACTED = "contracted"  # by an einsum or tensordot, which may take several dimensions of a stack at once
LOOKED_UP = "looked up"
CONVOLVED = "convolved"

_CALLS = (
    (CONVOLVED, re.compile(r"conv", re.IGNORECASE)),
    (LOOKED_UP, re.compile(r"embedding|index_select|gather|take_along_dim", re.IGNORECASE)),
    (CONTRACTED, re.compile(r"einsum|tensordot|contract", re.IGNORECASE)),
    (MULTIPLIED, re.compile(r"(?<!non)linear|matmul|gemm|(^|_)(add|b|baddb|addb|sp)?mm(_|$)", re.IGNORECASE)),
)


@functools.cache
def uses_of(kind: type) -> dict[str, frozenset[str]]:
    """What the methods of a module class do with the attributes of ``self``.

    Args:
        kind: the class. Its bases are read as well, except those of torch itself.

    Returns:
        For each attribute the words above that apply; nothing where the source cannot be had.
    """
    found: dict[str, set[str]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch" or not issubclass(base, nn.Module):
            continue
        for function in _functions(base):
            for name, use in _uses_in(function):
                found.setdefault(name, set()).add(use)
    return {name: frozenset(uses) for name, uses in found.items()}


def _functions(kind: type) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return  # made at run time, as FSDP2's and parametrize's classes are, or without source
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def _uses_in(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """(attribute, use) for the products and look-ups in a function."""
    # Names that stand for an attribute (``weight = self.weight.to(x.dtype)``), and for what the function was given.
    names: dict[str, set[str]] = {}
    given = {argument.arg for argument in (*function.args.posonlyargs, *function.args.args)} - {"self"}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, set()).update(_operand(node.value, {}, given))
    for node in ast.walk(function):
        use, operands = "", list[ast.expr]()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            use, operands = MULTIPLIED, [node.left, node.right]
        elif isinstance(node, ast.Subscript) and not _is_slice(node.slice):
            use, operands = LOOKED_UP, [node.value]
        elif isinstance(node, ast.Call):
            use, operands = _use_of_call(node.func), [*node.args, *(keyword.value for keyword in node.keywords)]
            if _is_own(node.func):
                # ``self.linear(table)`` calls a module with a weight of its own, ``self.linear(x, weight)`` a method.
                use = use if len(operands) > 1 else ""
            elif isinstance(node.func, ast.Attribute):
                operands.append(node.func.value)  # x.matmul(self.weight), self.weight.mm(x)
        if use:
            yield from ((name, use) for operand in operands for name in _operand(operand, names, given))


def _is_own(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self"


def _use_of_call(function: ast.expr) -> str:
    """The use that a call is, by the name of what is called (``F.linear``, ``LinearFunction.apply``); "" for others."""
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    for use, pattern in _CALLS:
        if any(pattern.search(part) for part in parts):
            return use
    return ""


def _operand(node: ast.expr, names: dict[str, set[str]], given: set[str]) -> set[str]:
    """The attributes of ``self`` that an operand is, through transposes, views, casts and indices."""
    while True:
        if _is_own(node):
            assert isinstance(node, ast.Attribute)
            return {node.attr}
        if isinstance(node, ast.Name):
            return names.get(node.id, set())
        if isinstance(node, (ast.Attribute, ast.Subscript)):  # self.weight.T, self.weight[expert]
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not _use_of_call(node.func):
            owner = node.func.value  # self.weight.t(), torch.transpose(self.weight, 0, 1)
            is_library = isinstance(owner, ast.Name) and owner.id not in ("self", *names, *given)
            if is_library and not node.args:
                return set()
            node = node.args[0] if is_library else owner
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div, ast.Add, ast.Sub)):
            if any(isinstance(side, ast.Name) and side.id in given for side in (node.left, node.right)):
                return set()  # the gains of ``(x * self.gain) @ self.weight`` are not what is multiplied with
            return _operand(node.left, names, given) | _operand(node.right, names, given)
        else:
            return set()


def _is_slice(index: ast.expr) -> bool:
    """Whether an index only narrows (``weight[:n]``, ``weight[None]``), and so looks nothing up."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        isinstance(part, ast.Slice) or (isinstance(part, ast.Constant) and part.value in (None, Ellipsis))
        for part in parts
    )
