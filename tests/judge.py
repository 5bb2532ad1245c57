"""The verdict of exactness tests: errors against the dense reference, held under a tolerance and kept for the page.

With ``APOLLO_TEST_RECORD=FILE`` every judged error is appended to FILE, a JSON object a line; ``python -m
tests.exactness_page`` makes docs/exactness.md of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping

VARIABLE = "APOLLO_TEST_RECORD"


def judge(
    results: Iterable[Mapping[str, Mapping[str, float] | str]],
    tolerance: float,
    engine: Callable[[str], str],
    dtype: str = "float64",
    rule: Callable[[str], str] = lambda case: "APOLLO",
) -> None:
    """Require that no weight is off by the tolerance, on any rank.

    Args:
        results: of each rank, by case, the relative error of each weight, by any name; or why the case did not run.
        tolerance: the bound, exclusive.
        engine: the name of a case's engine, as the page shows it.
        dtype: of the weights that are compared.
        rule: the name of a case's update rule.

    Raises:
        AssertionError: which names the case and its worst weight.
    """
    ranks = list(results)
    assert ranks
    for errors in ranks:
        for case, found in errors.items():
            worst = worst_of(case, found)
            _record(rule(case), engine(case), len(ranks), dtype, case, worst[0], tolerance)
            check(case, worst, tolerance)


def assert_small(case: str, found: Mapping[str, float] | str, tolerance: float) -> None:
    """The verdict on one case, which is not kept for the page; arguments and errors as of ``judge``."""
    check(case, worst_of(case, found), tolerance)


def worst_of(case: str, found: Mapping[str, float] | str) -> tuple[float, str]:
    """The largest error of a case and the name of its weight; an AssertionError where the case did not run."""
    assert isinstance(found, Mapping) and found, f"{case}: {found}"
    # NaN compares with nothing, so it would not be found as the largest.
    return max((math.inf if math.isnan(error) else error, name) for name, error in found.items())


def check(case: str, worst: tuple[float, str], tolerance: float) -> None:
    """Require that the largest error is below the tolerance."""
    error, name = worst
    assert error < tolerance, f"{case}: {name} is off by {error:.1e}"


def _record(rule: str, engine: str, ranks: int, dtype: str, case: str, error: float, tolerance: float) -> None:
    path = os.environ.get(VARIABLE)
    if path:
        entry = {"rule": rule, "engine": engine, "ranks": ranks, "dtype": dtype, "case": case, "error": error}
        with open(path, "a") as file:  # a line at once: processes of one run share the file
            file.write(json.dumps({**entry, "tolerance": tolerance}) + "\n")
