"""The choice as a table: each parameter, its shape, low-rank or AdamW, and why."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..sharding.names import pattern_of
from .choice import Chosen, check_embeddings, of_model

HEAD = ("parameter", "shape", "update", "why")


def describe(
    model: nn.Module,
    rank: int = 256,
    *,
    exclude: str | None = None,
    embeddings: str = "adamw",
    every: bool = False,
) -> None:
    """Print which parameters of a model APOLLO makes low-rank, which AdamW takes, and why.

    The choice is that of ``APOLLO(model, rank=rank, exclude=exclude)``; nothing is trained or changed. The model may be
    on any device, the meta device included, and wrapped or sharded.

    Args:
        model: the model.
        rank: r of the low-rank matrices. 1 is that of ``APOLLOMini``.
        exclude: a regular expression of names to leave to AdamW.
        embeddings: as of ``APOLLO``.
        every: print a line for each parameter. Otherwise parameters that differ in numbers only share a line.

    Raises:
        ValueError: if ``exclude`` is no regular expression, for another value of ``embeddings``, or for FSDP1 without
            ``use_orig_params=True``.
    """
    check_embeddings(embeddings)
    print(table(of_model(model, rank, exclude, embeddings).values(), every=every))


def table(choice: Iterable[Chosen], *, every: bool = False) -> str:
    """The table of a choice, with a last line that counts; see ``describe``."""
    choice = list(choice)
    lines: dict[tuple[str, ...], int] = {}
    for chosen in choice:
        verdict = chosen.verdict
        name = verdict.name if every else pattern_of(verdict.name)
        shape = " x ".join(map(str, verdict.shape)) or "scalar"
        update = "low-rank" if chosen.low_rank else "AdamW"
        key = (name, shape, f"frozen ({update})" if verdict.frozen else update, verdict.why)
        lines[key] = lines.get(key, 0) + 1
    rows = [HEAD, *((f"{n} ({count})" if count > 1 else n, *more) for (n, *more), count in lines.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    text = ["  ".join((*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3])) for row in rows]
    trained = [chosen for chosen in choice if not chosen.verdict.frozen]
    low = [chosen.verdict.numel for chosen in trained if chosen.low_rank]
    total = sum(chosen.verdict.numel for chosen in trained)
    share = f"{100 * sum(low) / total:.1f} %" if total else "none"
    frozen = f"; {len(choice) - len(trained)} more are frozen" if len(trained) < len(choice) else ""
    text.append(f"{len(low)} of {len(trained)} parameters are low-rank, {share} of {total:,} elements{frozen}")
    return "\n".join(line.rstrip() for line in text)
