"""The package's floors: how long chains of imports are, that they point down, and how long files and functions are.

A module's *floor* is one more than the highest floor of the modules of the package that it imports when it is loaded; a
module that imports none is on floor 1. Every file is a module, ``__init__`` too. What stands under ``if TYPE_CHECKING``
or inside a function loads nothing and is no floor, but it must not point up or run in a circle either.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import apollo_dist

PACKAGE = Path(apollo_dist.__file__).parent
HIGHEST = 10
FILE, FUNCTION, ROOT_MODULES = 350, 60, 7

# From the bottom up. The public face is what stands in the package's root; the applications above use what it offers.
LIBRARY = (
    "kernels", "weights", "rules", "projections", "distributed", "sharding", "exchange", "state", "step", "selection",
    "optimizers", "checkpoint", "integrations",
)  # fmt: skip
FACE = ("layerwise", "hugging_face", "projection", "")
APPLICATIONS = ("pretrain", "planning", "preflight", "reporting", "__main__")
ORDER = ("_version", *LIBRARY, *FACE, *APPLICATIONS)
# (from, to): a type alone, since what is shown or resharded is handed over.
TYPES_ALONE = {("state", "step")}


@cache
def modules() -> dict[str, Path]:
    """Every module's file by its name in the package; the package itself is ""."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return found


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is loaded."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield node
        if isinstance(node, ast.If):
            yield from () if "TYPE_CHECKING" in ast.unparse(node.test) else statements(node.body)
            yield from statements(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
                yield from statements(part)
        elif isinstance(node, (ast.With, ast.ClassDef, ast.For, ast.While)):
            yield from statements(node.body)


def imported(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """The modules of the package that import statements of a module name."""
    path = modules()[name]
    package = [part for part in ("apollo_dist", *name.split(".")) if part]
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if short(inner) in modules() else source)
    inside = {short(each) for each in found if each.partition(".")[0] == "apollo_dist"}
    return {each for each in inside if each in modules() and each != name}


def short(name: str) -> str:
    return name.removeprefix("apollo_dist").removeprefix(".")


@cache
def loaded() -> dict[str, set[str]]:
    """By module what is loaded with it."""
    return {name: imported(name, statements(ast.parse(path.read_text()).body)) for name, path in modules().items()}


@cache
def named() -> dict[str, set[str]]:
    """By module all that it names, also for types alone and inside of functions."""
    return {name: imported(name, ast.walk(ast.parse(path.read_text()))) for name, path in modules().items()}


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name]):
            found = visit(other, [*above, name])
            if found:
                return found
        done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in edges)), [])


@cache
def chain(name: str, ground: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The longest chain of imports from a module down, which ends above the modules of ``ground``."""
    below = (chain(other, ground) for other in sorted(loaded()[name] - ground))
    return (name, *max(below, key=len, default=()))


def of_library(name: str) -> bool:
    return name.partition(".")[0] not in APPLICATIONS


def test_no_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle(named()), "imports run in a circle"


def test_imports_between_folders_point_down() -> None:
    up = []
    for name, others in named().items():
        for other in others:
            here, there = name.partition(".")[0], other.partition(".")[0]
            assert here in ORDER, f"where does {here} stand? Add it to the order of folders"
            is_type = (here, there) in TYPES_ALONE and other not in loaded()[name]
            if ORDER.index(there) > ORDER.index(here) and not is_type:
                up.append(f"{name} imports {other}")
    assert not up


def test_the_library_has_at_most_ten_floors() -> None:
    """The library is what ``import apollo_dist`` loads, and what stands beside it below the applications."""
    longest = max((chain(name) for name in modules() if of_library(name)), key=len)
    assert len(longest) <= HIGHEST, " > ".join(longest)
    assert len(chain("")) > 1 and all(map(of_library, chain("")))


def test_applications_stand_on_the_library() -> None:
    """Their own floors, counted from the library's uppermost one, which for them is the ground."""
    ground = frozenset(filter(of_library, modules()))
    longest = max((chain(name, ground) for name in modules() if not of_library(name)), key=len)
    assert len(longest) <= HIGHEST, " > ".join(longest)


def test_the_page_tells_the_longest_chain() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = re.search(r"^    (apollo_dist > .*(?:\n    .*)*)", page, re.MULTILINE)
    assert told is not None
    names = [name.strip() for name in told[1].split(">")]
    below = ["" if name == "apollo_dist" else name for name in names]
    assert all(other in loaded()[name] for name, other in pairwise(below)), names
    longest = max(len(chain(name)) for name in modules() if of_library(name))
    assert len(names) == longest, f"the longest chain has {longest} modules: {' > '.join(chain(''))}"


def test_files_and_functions_are_short() -> None:
    long = []
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > FILE:
            long.append(f"{name} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION:
                    long.append(f"{name}.{node.name} has {lines} lines")
    assert not long
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES
