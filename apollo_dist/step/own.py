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
from .low_rank import products
from .matrix import take
from .reduce import parts_of, receive

if TYPE_CHECKING:
    from ..exchange.messages import Received
    from ..kernels.parts import ProjectPart
    from ..projections.cache import ProjectionCache
    from ..projections.slices import Projection
    from .batch import Batch, Tiles


def own(
    batch: Batch,
    grads: Tiles,
    projections: ProjectionCache,
    received: Sequence[Received | None],
    terms: Tensor,
    made: dict[int, list[Tensor]],
) -> Sequence[Tensor | None]:
    """Complete what the owner sees of its channels, run the rule over them, and write this rank's terms.

    Args:
        batch: the matrices.
        grads: what is reduced of the batch's matrices; those without a gradient are skipped.
        projections: of the shard group, in the current step.
        received: for each matrix of the shard group what ``Exchange.reduce_to_owners`` returned, or None.
        terms: (matrices of the shard group, columns), written in place.
        made: by number in the shard group the low-rank updates that other ranks get as elements, written.

    Returns:
        For each matrix of the batch what its owned channels answer, (channels, numbers), in the order of
        ``Reply.columns``; None if the rule answers nothing.
    """
    declared, kwargs = batch.declared, batch.factory_kwargs
    columns = declared.reply.columns(declared.reduce.low_rank)
    terms = terms[batch.first : batch.first + len(batch.matrices)]
    # Zeros where there is no gradient.
    reply = torch.zeros((batch.channels, batch.matrices[0].spec.reply_numbers), **kwargs)
    norms = torch.empty(batch.channels, **kwargs) if declared.reduce.channel_norms else None
    # R of one chunk at a time, and as much for the rule to work in, in the same memory. Kernels that take many matrices
    # need no such memory, and then it is that of R.
    most = max(sum(batch.counts[chunk.start : chunk.stop]) for chunk in batch.chunks)
    space = torch.empty((1 if batch.kernels.together else 2, most, declared.reduce.low_rank), **kwargs)
    for chunk in batch.chunks:
        start, stop = batch.rows[chunk.start].start, batch.rows[chunk[-1]].stop
        squares = None if norms is None else norms[start:stop]
        used = {k: projections.of(batch.first + k, Phase.OWN) for k in chunk if grads[k] is not None}
        lines = _reduce(batch, chunk, grads, used, received, space[0, : stop - start], squares)
        grams = {k: p.gram for k, p in used.items() if p is not None} if declared.reduce.gram else {}
        multiplied = {k: p for k, p in used.items() if batch.matrices[k].channels.products}
        del used
        _add_squares(lines, terms[:, declared.terms - 1 : declared.terms])
        if squares is not None:
            squares.sqrt_()
        for members, rows in batch.active_runs(chunk, grads):
            if norms is not None and batch.inverse_roots is not None:
                norms[rows] *= batch.inverse_roots[rows]
            local = slice(rows.start - start, rows.stop - start)
            counts = [batch.counts[k] for k in members]
            step = batch.matrices[members[0]].state[STEP]
            norms_seen = None if norms is None else norms[rows]
            grams_seen = [grams[k] for k in members] if grams else []
            seen = Seen(space[0, local], norms_seen, space[-1, local], counts, step, grams_seen, batch.kernels)
            state = {name: values[rows] for name, values in batch.channel_state.items()}
            update = batch.rule.owner_step(seen, state, batch.group)
            _write(update, columns, reply[rows])
            if update.terms is not None:
                _add_terms(update.terms, members, terms)
        for k, projection in multiplied.items():
            made[batch.first + k] = products(batch.matrices[k], columns, reply[batch.rows[k]], projection)
    return torch.split(reply, batch.counts) if reply.shape[1] else [None] * len(batch.matrices)


def _reduce(
    batch: Batch,
    chunk: range,
    grads: Tiles,
    projections: Mapping[int, Projection | None],
    received: Sequence[Received | None],
    low_rank: Tensor,
    squares: Tensor | None,
) -> list[tuple[Tensor, int]]:
    """Write R, and the squared norms of the gradient, over the owned channels of a chunk of a batch.

    Here R gets the factor that random projections are generated without, and its sign.

    Args:
        batch, chunk: the matrices.
        grads, received: as of ``own``.
        projections: by number those of the matrices with a gradient.
        low_rank: (owned channels of the chunk, r), written.
        squares: (owned channels of the chunk,), written; None where norms by channel are not needed.

    Returns:
        Where the rule needs norms of whole matrices: tensors, each with the number of a matrix of the batch, whose
        squared norms sum to that of the local elements.
    """
    alpha = batch.matrices[chunk.start].projection_scale * (-1.0 if batch.group["maximize"] else 1.0)
    lines: list[tuple[Tensor, int]] | None = [] if batch.declared.reply.matrix_norm else None
    first = batch.rows[chunk.start].start
    parts: list[ProjectPart] = []
    for k, projection in projections.items():
        grad, m = grads[k], batch.matrices[k]
        assert grad is not None
        parts += parts_of(grad, m.local_only, projection, batch.rows[k].start - first, k)
        if lines is not None:
            shared = (take(grad[number], rows) for number, rows, _ in m.shared.parts)
            lines += [(line_norms(tile), k) for tile in shared if tile.numel()]
    if parts:
        batch.kernels.project(parts, alpha, low_rank, squares, lines)
    for k, projection in projections.items():
        rows = slice(batch.rows[k].start - first, batch.rows[k].stop - first)
        mine = None if squares is None else squares[rows]
        receive(batch.matrices[k], low_rank[rows], mine, projection, received[batch.first + k], alpha)
    return lines or []


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
