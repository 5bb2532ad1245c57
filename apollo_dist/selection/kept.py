"""The choice of an optimizer: made once for each parameter, and kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from .choice import check_any, choose, tell

if TYPE_CHECKING:
    from .parameter import Parameter


class KeptChoice:
    """Which of the parameters that came without a rank are low-rank.

    A parameter is decided once, and stays so whatever is added, renamed or attached later.

    Args:
        exclude: a regular expression of names to leave to AdamW.
        embeddings: "low_rank" to take embeddings and output heads as well, else "adamw".
    """

    def __init__(self, exclude: str | None, embeddings: str = "adamw") -> None:
        self.exclude, self.embeddings = exclude, embeddings
        # By name: whether it is low-rank.
        self.low_rank: dict[str, bool] = {}

    @property
    def asked(self) -> str:
        """What was asked for other than by default, for messages; "" for nothing."""
        given = ("exclude", self.exclude, None), ("embeddings", self.embeddings, "adamw")
        return ", ".join(f"{key}={value!r}" for key, value, default in given if value != default)

    def decide(self, parameters: Iterable[Parameter], rank: int, model: nn.Module | None) -> None:
        """Decide on parameters that are not decided yet; the log then says what AdamW takes.

        Args:
            parameters: all that the optimizer chooses among.
            rank: r of the low-rank ones.
            model: whose parameters they are, where it is known.

        Raises:
            ValueError: if nothing is low-rank, or for ``exclude`` without names.
        """
        parameters = list(parameters)
        if self.covers(parameters):
            return
        new = {p.name for p in parameters} - self.low_rank.keys()
        found = choose(parameters, rank, model=model, exclude=self.exclude, embeddings=self.embeddings)
        if not any(self.low_rank.values()):
            check_any(found, f"{len(parameters)} parameters", rank)
        found = {name: chosen for name, chosen in found.items() if name in new}
        self.low_rank |= {name: chosen.low_rank for name, chosen in found.items()}
        tell(found, rank)

    def covers(self, parameters: Iterable[Parameter]) -> bool:
        """Whether all of the parameters are decided on."""
        return all(p.name in self.low_rank for p in parameters)

    def expected(self, parameters: Iterable[Parameter], rank: int, model: nn.Module | None) -> dict[str, bool]:
        """What ``decide`` would decide; nothing is kept."""
        parameters = list(parameters)
        if self.covers(parameters):
            return self.low_rank
        found = choose(parameters, rank, model=model, exclude=self.exclude, embeddings=self.embeddings)
        return {name: chosen.low_rank for name, chosen in found.items()} | self.low_rank

    def check(self, parameters: Iterable[Parameter], rank: int) -> None:
        """Raise ValueError if nothing would be low-rank as far as names and shapes say; decide nothing."""
        parameters = list(parameters)
        exclude = self.exclude if all(p.named for p in parameters) else None
        found = choose(parameters, rank, exclude=exclude, embeddings=self.embeddings)
        check_any(found, f"{len(parameters)} parameters", rank)
