"""A model and its optimizer as they are opened for saving or loading; whether a checkpoint fits them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..distributed import rank_of
from ..sharding.deepspeed import zero_engine
from ..state.identity import PROJECTIONS, old_projections
from .options import restore_options

if TYPE_CHECKING:
    from ..weights.int8 import Int8Rows
    from .shards import Shards

logger = logging.getLogger("apollo_dist")

# Kinds of parameters: without optimizer state, and with some.
LOW_RANK = "low-rank"
FROZEN, BUFFER = "frozen", "buffer"


@dataclass
class Contents:
    """A model and its optimizer as this rank sees them, for saving or for loading into.

    Attributes:
        tensors: what this rank holds, by key; loading fills it in place.
        description: of everything, the same on all ranks, as plain values: "parameters", "optimizer", "engine".
        weights_alone: whether there is no optimizer.
        accepted: what the optimizer's ``accept_at_load`` lets differ.
        after_load: what turns loaded tensors into state; local.
        groups: the live parameter groups, each with the names of its parameters.
        engine, wrapper: DeepSpeed's, or None.
        rows: of the weights that are INT8 here, by name, what reads and writes them.
    """

    tensors: dict[str, Shards] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    after_load: list[Callable[[], None]] = field(default_factory=list)
    groups: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    engine: Any = None
    wrapper: Any = None
    weights_alone: bool = False
    accepted: frozenset[str] = frozenset()
    rows: dict[str, Int8Rows] = field(default_factory=dict)

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first differences, unless a checkpoint of that description fits.

        State of parameters that train here and were frozen where it was saved begins at zero.
        """
        problems = list(_differences(saved, self.description, self.weights_alone, self.accepted))
        rounded = list(_rounded(saved["parameters"], self.description["parameters"]))
        if rounded and rank_of() == 0:
            logger.warning("%d tensors lose precision, such as %s", len(rounded), rounded[0])
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError("the checkpoint does not fit: " + "; ".join(problems[:5]) + more)
        if not self.weights_alone and "projections" not in self.accepted:
            _check_projections(saved)
        if not self.weights_alone:
            self._begin_anew({n for n, about in saved["parameters"].items() if about["kind"] == FROZEN})

    def _begin_anew(self, names: Set[str]) -> None:
        """Take the state of some parameters for that of before their first step, and out of what is to be read."""
        begun = set()
        for key in [key for key in self.tensors if key.startswith("optimizer.")]:
            name = re.sub(r"\[\d+\]$", "", key.removeprefix("optimizer.").rpartition(".")[0])
            if name in names:
                begun.add(name)
                for piece in self.tensors.pop(key).pieces:
                    piece.tensor.zero_()
        if begun and rank_of() == 0:
            logger.info(
                "the checkpoint has no state for %d parameters that were frozen when it was saved, such as %s: it "
                "begins at zero",
                len(begun),
                min(begun),
            )

    def finish_load(self, saved: Mapping[str, Any]) -> None:
        """Local work after the tensors are read: counts of steps, options of the parameter groups."""
        for work in self.after_load:
            work()
        if not self.weights_alone:
            restore_options(self.groups, saved)

    def update_engine(self, saved: Mapping[str, Any], step: int) -> None:
        """What DeepSpeed derives from the loaded weights; a collective under ZeRO."""
        if self.engine is not None:
            zero_engine.update_model(self.wrapper)
            zero_engine.restore(self.engine, self.wrapper, step, saved["engine"])


def _check_projections(saved: Mapping[str, Any]) -> None:
    """Raise ValueError if low-rank moments are of projections as an older version generated them."""
    low_rank = any(about["kind"] == LOW_RANK for about in saved["parameters"].values())
    if low_rank and saved["optimizer"].get("projections", 1) != PROJECTIONS:
        raise old_projections("the checkpoint", "checkpoint.load")


def _differences(
    saved: Mapping[str, Any], here: Mapping[str, Any], weights_alone: bool, accepted: Set[str]
) -> Iterator[str]:
    """What keeps a checkpoint from continuing here: one line each."""
    compared = () if weights_alone else (("name", "optimizer"), ("seed", "seed of the projections"))
    for key, what in compared:
        if key in accepted:
            continue
        was, now = saved["optimizer"].get(key), here["optimizer"].get(key)
        if was != now:
            yield f"its {what} is {was}, and here it is {now}"
    theirs, ours = saved["parameters"], here["parameters"]
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        was, now = theirs.get(name), ours.get(name)
        if was is None:
            yield f"it has no {name}"
        elif now is None:
            yield f"its {name} is not in the model"
        else:
            # What was frozen, and trains now, has no state to compare.
            of_state = () if weights_alone or (was["kind"] == FROZEN and now["kind"] != BUFFER) else ("kind", "rank")
            for key in ("shape", *of_state):
                if was.get(key) != now.get(key):
                    yield f"{key} of {name} was {was.get(key)}, and here it is {now.get(key)}"
            # Checkpoints of before there were others do not say it.
            before, entries = (about.get("entries", "gaussian") for about in (was, now))
            if of_state and before != entries:
                yield f"the projection of {name} had {before} entries, and here it has {entries} ones"


def _rounded(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What is stored in more precision than it has here, with both dtypes."""
    for name in saved.keys() & here.keys():
        was, now = saved[name]["dtype"], here[name]["dtype"]
        if here[name].get("stored") and not saved[name].get("stored"):
            yield f"{name}: {was} in the checkpoint, {here[name]['stored']} here"
        before, after = getattr(torch, was), getattr(torch, now)
        if before.is_floating_point and torch.promote_types(before, after) != after:
            yield f"{name}: {was} in the checkpoint, {now} here"
