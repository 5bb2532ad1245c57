"""The options that rules read from a parameter group: their defaults, and what makes a value good or bad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Check = Callable[[Any], str]


class Option(NamedTuple):
    """One option of a rule.

    Attributes:
        default: the value in groups that do not say another.
        check: takes a plain value and returns what it must be, for an error; "" if the value is good.
        elsewhere: its name in another package, which is an error here.
    """

    default: Any
    check: Check
    elsewhere: str = ""


def number(want: str, good: Callable[[float], bool]) -> Check:
    """A check for a number (no bool) that is ``good``; ``want`` says what that is, such as ">= 0"."""

    def check(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "a number"
        return "" if good(float(value)) else want

    return check


def integer(least: int) -> Check:
    """A check for an integer of at least ``least``."""

    def check(value: Any) -> str:
        return "" if type(value) is int and value >= least else f"an integer >= {least}"

    return check


def one_of(values: tuple[Any, ...], want: str) -> Check:
    """A check for one of some values."""
    return lambda value: "" if any(value is one or (type(value) is str and value == one) for one in values) else want


def optional(check: Check) -> Check:
    """A check that also takes None."""
    return lambda value: "" if value is None else check(value)


def two_betas(value: Any) -> str:
    """The check of Adam's betas."""
    two = isinstance(value, tuple) and len(value) == 2 and all(type(beta) in (int, float) for beta in value)
    return "" if two and all(0.0 <= beta < 1.0 for beta in value) else "two numbers in [0, 1)"


flag = one_of((True, False), "True or False")
not_negative = number(">= 0", lambda value: value >= 0.0)
positive = number("> 0", lambda value: value > 0.0)
decay_rate = number("in [0, 1)", lambda value: 0.0 <= value < 1.0)
DTYPES = {None: None, "float32": None, "bfloat16": torch.bfloat16}
# Of Adam's moments, where they are kept for each element.
ADAM_DTYPE = Option(None, one_of(tuple(DTYPES), "None (that of the computation), torch.float32 or torch.bfloat16"))
BETAS = Option((0.9, 0.999), two_betas)
