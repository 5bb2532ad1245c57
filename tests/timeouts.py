"""How long tests wait: every deadline of the suite passes through here.

A shared machine may be several times slower than an idle one. ``APOLLO_TEST_TIMEOUT_SCALE=3`` triples every deadline
and changes nothing else: a test that passes does not wait for its deadline.
"""

from __future__ import annotations

import os

VARIABLE = "APOLLO_TEST_TIMEOUT_SCALE"


def scale() -> float:
    """The factor on every deadline, 1 unless the environment says otherwise.

    Raises:
        ValueError: if the variable is set to something that is not a positive number.
    """
    text = os.environ.get(VARIABLE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ValueError(f"{VARIABLE}={text} is not a positive number")
    return factor


def allowed(seconds: float) -> float:
    """The deadline, in seconds, for what takes at most ``seconds`` on an idle machine with two cores."""
    return seconds * scale()
