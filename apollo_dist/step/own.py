"""The second phase of a step: at the owners, the rule sees its channels, updates their state and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.reduce import line_norms
from ..projections.slices import Phase
from ..rules.base import Seen, Update
from ..state.slots import STEP
from .reduce import complete

if TYPE_CHECKING:
    from ..exchange.messages import Received
    from ..projections.cache import ProjectionCache
    from .batch import Batch, Tiles


def own(
    batch: Batch,
    grads: Tiles,
    projections: ProjectionCache,
    received: Sequence[Received | None],
    terms: Tensor,
) -> Sequence[Tensor | None]:
    """Complete what the owner sees of its channels, run the rule over them, and write this rank's terms.

    Args:
        batch: the matrices.
        grads: what is reduced of the batch's matrices; those without a gradient are skipped.
        projections: of the shard group, in the current step.
        received: for each matrix of the shard group what ``Exchange.reduce_to_owners`` returned, or None.
        terms: (matrices of the shard group, columns), written in place.

    Returns:
        For each matrix of the batch what its owned channels answer, (channels, numbers), in the order of
        ``Reply.columns``; None if the rule answers nothing.
    """
    declared, kwargs = batch.declared, batch.factory_kwargs
    terms = terms[batch.first : batch.first + len(batch.matrices)]
    # Zeros where there is no gradient.
    reply = torch.zeros((batch.channels, batch.matrices[0].spec.reply_numbers), **kwargs)
    norms = torch.empty(batch.channels, **kwargs) if declared.reduce.channel_norms else None
    norms_of = [None] * len(batch.matrices) if norms is None else torch.split(norms, batch.counts)
    # R of one chunk at a time, and as much for the rule to work in, in the same memory.
    most = max(sum(batch.counts[chunk.start : chunk.stop]) for chunk in batch.chunks)
    space = torch.empty((2, most, declared.reduce.low_rank), **kwargs)
    for chunk in batch.chunks:
        start = batch.rows[chunk.start].start
        lines: list[tuple[Tensor, int]] = []
        grams: dict[int, Tensor] = {}
        low_ranks = torch.split(space[0, : batch.rows[chunk[-1]].stop - start], batch.counts[chunk.start : chunk.stop])
        for k, low_rank in zip(chunk, low_ranks, strict=True):
            grad, place = grads[k], batch.first + k
            if grad is None:
                continue
            projection = projections.of(place, Phase.OWN)
            complete(batch.matrices[k], grad, low_rank, norms_of[k], projection, received[place])
            if declared.reduce.gram and projection is not None:
                grams[k] = projection.gram
            if declared.reply.matrix_norm:  # now, while the gradient is in the cache
                lines += [(line_norms(tile), k) for tile in grad if tile.numel()]
        _add_squares(lines, terms[:, declared.terms - 1 : declared.terms])
        for members, rows in batch.active_runs(chunk, grads):
            if norms is not None and batch.inverse_roots is not None:
                norms[rows] *= batch.inverse_roots[rows]
            local = slice(rows.start - start, rows.stop - start)
            counts = [batch.counts[k] for k in members]
            step = batch.matrices[members[0]].state[STEP]
            norms_seen = None if norms is None else norms[rows]
            grams_seen = [grams[k] for k in members] if grams else []
            seen = Seen(space[0, local], norms_seen, space[1, local], counts, step, grams_seen)
            state = {name: values[rows] for name, values in batch.channel_state.items()}
            update = batch.rule.owner_step(seen, state, batch.group)
            _write(update, declared.reply.columns(declared.reduce.low_rank), reply[rows])
            if update.terms is not None:
                _add_terms(update.terms, members, terms)
    return torch.split(reply, batch.counts) if reply.shape[1] else [None] * len(batch.matrices)


def _write(update: Update, columns: Mapping[str, slice], out: Tensor) -> None:
    """Write what a rule answers of channels to their rows of the reply, (channels, numbers)."""
    for name, where in columns.items():
        values: Tensor = getattr(update, name)
        out[:, where] = values if values.ndim == 2 else values[:, None]


def _add_squares(parts: Sequence[tuple[Tensor, int]], out: Tensor) -> None:
    """Add the squared norms of tensors to ``out``, (matrices, 1), in order: (tensor, its matrix) each."""
    if parts:
        squares = torch.stack(torch._foreach_norm([tensor for tensor, _ in parts])).square_()
        _add_terms(squares[:, None], [k for _, k in parts], out)


def _add_terms(terms: Tensor, members: Sequence[int], out: Tensor) -> None:
    """Add rows of terms to ``out``, (matrices, columns), each to its matrix's, in order."""
    out = out[:, : terms.shape[1]]
    first = 0
    for last, (k, following) in enumerate(zip(members, [*members[1:], None], strict=True), start=1):
        if following == k + 1:
            continue  # the next matrix's row is added together with this one
        out[k + 1 - (last - first) : k + 1] += terms[first:last]
        first = last
