"""The checkpoints of a run: ``apollo_dist.checkpoint`` with the schedule, the data position and what the run is.

They lie in OUTPUT/checkpoints, which must be on storage that all ranks share. A run resumes under any engine and at any
number of ranks; under the same ones it repeats the losses of a run that never stopped bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from apollo_dist import checkpoint
from apollo_dist.pretrain.distributed import Ranks, alike
from apollo_dist.pretrain.override import Change, apply, changes, options_now

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.data import Data
    from apollo_dist.pretrain.engines.base import Engine

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        config: where they lie, how many to keep, and whether to write them in the background.
        facts: what a resumed run must share with the one that saved: configuration and data.
        place: where the run takes place: engine, ranks, micro-batches. They may change; rounding changes with them.
        ranks: of this run.
        override: keys of the facts that may differ from those of the run that saved.
    """

    def __init__(
        self,
        config: Config,
        facts: Mapping[str, object],
        place: Mapping[str, object],
        ranks: Ranks,
        override: frozenset[str] = frozenset(),
    ) -> None:
        self._folder = config.output_folder / "checkpoints"
        self._keep, self._background = config.keep_checkpoints, config.background_checkpoints
        self._facts, self._place = (json.loads(json.dumps(each)) for each in (facts, place))  # as they read back
        self._ranks, self._override = ranks, override
        self.overridden: list[Change] = []  # of the checkpoint that `find` found
        self._pending: checkpoint.Pending | None = None
        self._newest: Path | None = None
        self.step: int | None = None  # of the newest checkpoint that this run has loaded, or begun to save

    def require_none(self) -> None:
        """Raise SetupError if there are any: a new run must not mix with an old one's; collective."""

        def check() -> None:
            found = sorted(path.name for path in self._folder.glob("step_*"))
            if found:
                raise ValueError(
                    f"{self._folder} has checkpoints up to {found[-1]}: "
                    "pass --resume to continue that run, or another --output"
                )

        self._ranks.together(check)

    def save(self, step: int, engine: Engine, data: Data) -> None:
        """Write the state after ``step``, or begin to in the background. Collective."""
        state = {
            "facts": self._facts,
            "place": self._place,
            "schedule": engine.schedule.state_dict(),
            "data": self._ranks.gather(data.train.state_dict()),
            "random": self._ranks.gather(_random_state(self._ranks.device)),
        }
        saved = _together(
            lambda: checkpoint.save(
                self._folder, engine.trained, engine.optimizer, state, step=step, keep=self._keep,
                background=self._background, tokenizer=data.tokenizer,
            )
        )  # fmt: skip
        self.step = step
        if isinstance(saved, checkpoint.Pending):
            self._pending = saved
        else:
            self._newest = saved

    def finish(self) -> Path | None:
        """Wait for a save in the background; the newest checkpoint that this run has loaded or saved. Collective."""
        if self._pending is not None:
            self._newest = _together(self._pending.wait)
            self._pending = None
        return self._newest

    def find(self) -> checkpoint.Found:
        """The newest good checkpoint, every byte of it checked; collective.

        Raises SetupError on all ranks, naming the files, where there is none, or if it belongs to another run.
        """
        found = _together(lambda: checkpoint.find(self._folder))
        saved, own = _comparable(found.extra["facts"], self._facts)
        self.overridden = _together(lambda: changes(saved, own, self._override, found.step, str(found.path)))
        return found

    def load(self, found: checkpoint.Found, engine: Engine, data: Data) -> list[str]:
        """Continue from a checkpoint that `find` found; lines for the log. Collective."""
        own = options_now(engine.optimizer.param_groups)
        _together(lambda: checkpoint.load(found, engine.trained, engine.optimizer))
        self._newest, self.step = found.path, found.step
        state = found.extra
        groups = engine.optimizer.param_groups
        here = {
            "base_lrs": [group["initial_lr"] for group in groups],  # the checkpoint's; there may be more groups here
            "_last_lr": [group["lr"] for group in groups],
            "lr_lambdas": [None for _ in groups],
        }
        engine.schedule.load_state_dict({**state["schedule"], **here})
        apply(self.overridden, groups, own, engine.schedule)
        self._ranks.together(lambda: data.train.load_state_dicts(state["data"]))
        if len(state["random"]) == self._ranks.world:
            _set_random_state(state["random"][self._ranks.rank], self._ranks.device)
        told = [*found.problems, f"resumed after step {found.step} from {found.path}", *self._moved(state["place"])]
        if self.overridden:
            rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(float(group["lr"]) for group in groups))
            shown = "; ".join(map(str, self.overridden))
            told.append(f"overridden from step {found.step + 1} on: {shown}. Its learning rate is {rates}")
        return told

    def _moved(self, before: Mapping[str, Any]) -> list[str]:
        """A line for the log if the run that saved took place elsewhere."""
        changes = [
            key if isinstance(now, dict) else f"{key} {before.get(key)} -> {now}"
            for key, now in self._place.items()
            if before.get(key) != now
        ]
        change = ", ".join(changes)
        return [f"the run moved ({change}): losses equal those of the old place to rounding"] if changes else []


def _comparable(saved: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs' facts; if DeepSpeed's JSON brings only one's optimizer, of its options only the name.

    The JSON leaves options to the optimizer's defaults, and the checkpoint brings its own.
    """

    def kept(facts: Mapping[str, Any]) -> dict[str, Any]:
        # Checkpoints of version 0.1 say which initial weights the run had; its weights are in the checkpoint.
        facts = {key: value for key, value in facts.items() if key != "initial weights"}
        mixed = ("optimizer.type" in saved) != ("optimizer.type" in own)
        return {k: v for k, v in facts.items() if not mixed or k == "optimizer.name" or not k.startswith("optimizer.")}

    return kept(saved), kept(own)


def _together(work: Callable[[], T]) -> T:
    """Run what raises the same error on every rank; the error ends the job without a traceback."""
    with alike():
        return work()


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
