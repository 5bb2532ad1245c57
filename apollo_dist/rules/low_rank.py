"""What rules with Adam's moments of a low-rank gradient have in common: APOLLO, GaLore, Fira."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..kernels.adam import adam_direction, bias_correction
from .base import Group, MatrixRule, Reduce, Seen, State
from .options import BETAS, Option, integer, not_negative, one_of, optional

RANK = Option(256, optional(integer(1)))
PROJECTIONS = one_of(
    ("random", "svd", "subspace"),
    '"random" (from the seed), "svd" (the leading singular directions) or "subspace" (nearly those, cheaper)',
)


def projection(proj: str) -> dict[str, Option]:
    """The options of a projection, which by default is ``proj``."""
    return {
        "update_proj_gap": Option(200, integer(1)),
        "proj": Option(proj, PROJECTIONS),
        "refresh": Option(
            "together", one_of(("together", "spread"), '"together" or "spread" (over the steps of a gap)')
        ),
        "projection_dtype": Option(None, one_of((None, "bfloat16"), "None or torch.bfloat16")),
        "proj_type": Option("std", one_of(("std", "rademacher"), '"std" (normal entries) or "rademacher" (signs)')),
    }


ADAM: Mapping[str, Option] = {"betas": BETAS, "eps": Option(1e-6, not_negative)}


class LowRank(MatrixRule):
    """A rule for matrices that are chosen; ``rank=None`` leaves a group's parameters to the other rule."""

    chosen = True
    spec_options: tuple[str, ...] = ("rank", "proj", "projection_dtype", "proj_type")

    def takes(self, shape: Sequence[int], group: Group) -> bool:
        """All that is in a group with a rank; whether that is a matrix is checked when the step is planned."""
        return group["rank"] is not None

    def refuses_change(self, before: Group, now: Group) -> str:
        """Moments of one rank say nothing of another."""
        old, new = before["rank"], now["rank"]
        what = {True: "AdamW's, in the shape of a parameter", False: "low-rank"}[old is None]
        if None not in (old, new):
            what = f"of rank {old}, which say nothing of another projection"
        if old != new:
            return f"rank was {old} and is now {new}, but the moments of its matrices are {what}"
        for key in ("proj", "proj_type") if old is not None else ():
            if before[key] != now[key]:
                return f"{key} was {before[key]!r} and is now another, but moments are of the former"
        return ""

    def reduces(self, group: Group, **more: Any) -> Reduce:
        """R by the group's projection, and what else an owner must see."""
        entries = "gaussian" if group["proj_type"] == "std" else "rademacher"
        projection = entries if group["proj"] == "random" else group["proj"]
        rounded = projection != entries and group["projection_dtype"] is not None
        return Reduce(low_rank=group["rank"], projection=projection, projection_in_bfloat16=rounded, **more)

    def moments(self, group: Group, *of_matrix: str) -> State:
        """Both moments of R, and numbers of a matrix by name."""
        return State({"exp_avg": group["rank"], "exp_avg_sq": group["rank"]}, matrix=of_matrix)

    def normalized(self, seen: Seen, state: Mapping[str, Tensor], group: Group) -> Tensor:
        r"""Update the moments with R; :math:`N = M / (\sqrt{V} + \epsilon)` in ``seen.workspace``, (channels, r)."""
        moments = state["exp_avg"], state["exp_avg_sq"]
        adam_direction(*moments, seen.low_rank, seen.workspace, betas=group["betas"], eps=group["eps"])
        return seen.workspace

    def step_size(self, lr: Any, step: int, group: Group) -> Any:
        """With Adam's bias corrections, which are outside of epsilon here."""
        return lr * bias_correction(step, group["betas"])
