"""The second phase of a step: at the owners, the rule sees its channels, updates their state and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.reduce import line_norms
from ..kernels.transfer import to_device
from ..projections.slices import Phase
from ..rules.base import Seen, Update
from ..state.slots import STEP
from .low_rank import join_updates, products
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
        made: by number in the shard group the low-rank updates that other ranks get as elements, written; without a D.

    Returns:
        For each matrix of the batch what its owned channels answer, (channels, numbers), in the order of
        ``Reply.columns``; None if the rule answers nothing.
    """
    declared, kwargs, numbers = batch.declared, batch.factory_kwargs, batch.rule.low_rank_numbers
    terms = terms[batch.first : batch.first + len(batch.matrices)]
    # Zeros where there is no gradient.
    columns = declared.reply.columns(declared.reduce.low_rank)
    reply = torch.zeros((batch.channels, max((c.stop for c in columns.values()), default=0)), **kwargs)
    answers = torch.split(reply, batch.counts)
    norms = torch.empty(batch.channels, **kwargs) if declared.reduce.channel_norms else None
    kept = torch.empty((numbers, batch.channels), **kwargs) if numbers else None
    multiplied: dict[int, Projection | None] = {}
    # R of one chunk, and as much for the rule to work in; kernels that take many matrices need none, and get R's.
    most = max(sum(batch.counts[chunk.start : chunk.stop]) for chunk in batch.chunks)
    space = torch.empty((1 if batch.kernels.together else 2, most, declared.reduce.low_rank), **kwargs)
    for chunk in batch.chunks:
        rows = slice(batch.rows[chunk.start].start, batch.rows[chunk[-1]].stop)
        squares = None if norms is None else norms[rows]
        used = {k: projections.of(batch.first + k, Phase.OWN) for k in chunk if grads[k] is not None}
        lines = _reduce(batch, chunk, grads, used, received, space[0, : rows.stop - rows.start], squares)
        grams = {k: p.gram for k, p in used.items() if p is not None} if declared.reduce.gram else {}
        if not declared.reply.residual:
            multiplied |= {k: p for k, p in used.items() if batch.matrices[k].channels.products}
        del used
        _add_squares(lines, terms[:, declared.terms - 1 : declared.terms])
        for members, run in batch.active_runs(chunk, grads):
            local = space[:, run.start - rows.start : run.stop - rows.start]
            seen = _seen(batch, members, local, [grams[k] for k in members] if grams else [])
            if kept is None:
                _answer(batch, members, run, seen, norms, reply, terms)
            else:
                batch.rule.low_rank_step(seen, batch.state_of(run), batch.group, kept[:, run])
        if kept is None:
            _multiply(batch, multiplied, answers, made)
    # In one go over all channels, since there are more chunks than operations should be.
    if kept is not None:
        for members, run in batch.active_runs(range(len(batch.matrices)), grads):
            seen = _seen(batch, members, space[:, :0])._replace(made=kept[:, run])
            _answer(batch, members, run, seen, norms, reply, terms)
        _multiply(batch, multiplied, answers, made)
    return answers if reply.shape[1] else [None] * len(batch.matrices)


def _seen(batch: Batch, members: Sequence[int], space: Tensor, grams: Sequence[Tensor] = ()) -> Seen:
    """What the rule sees of some matrices but norms: R, and memory to work in, are the first and last of ``space``."""
    counts = [batch.counts[k] for k in members]
    return Seen(space[0], None, space[-1], counts, batch.matrices[members[0]].state[STEP], grams, batch.kernels)


def answer_with_factors(
    batch: Batch,
    active: Sequence[bool],
    owned: list[Tensor | None],
    projections: ProjectionCache,
    terms: Tensor,
    made: dict[int, list[Tensor]],
) -> None:
    """Complete the answers of a rule with a D, once its terms are summed: they depend on the factor of each matrix.

    Args:
        batch: the matrices; nothing is done for other rules.
        active: for each matrix of the shard group whether it has a gradient.
        owned: for each matrix of the shard group what ``own`` returned; what travels takes the place of the batch's.
        projections, made: as of ``own``.
        terms: (matrices of the shard group, columns), summed over ranks.
    """
    if not batch.declared.reply.residual:
        return
    moved = active[batch.here]
    answered = [answer for answer in owned[batch.here] if answer is not None]  # all of them
    answers = join_updates(batch, answered, batch.factors(moved, terms))
    for k, m in enumerate(batch.matrices):
        if moved[k] and m.channels.products:
            # Drawn anew where it is not kept: those of all matrices are more than there should be memory for.
            _multiply(batch, {k: projections.of(batch.first + k, Phase.OWN)}, answers, made)
    owned[batch.here] = answers


def _multiply(
    batch: Batch, projections: dict[int, Projection | None], answers: Sequence[Tensor], made: dict[int, list[Tensor]]
) -> None:
    """Make the low-rank updates that other ranks get as elements, and let the projections go.

    Args:
        batch: of the matrices.
        projections: of those with such updates, by number in the batch; emptied.
        answers: for each matrix of the batch what travels of its owned channels.
        made: as of ``own``.
    """
    for k, projection in projections.items():
        made[batch.first + k] = products(batch.matrices[k], answers[k], projection)
    projections.clear()


def _answer(
    batch: Batch,
    members: Sequence[int],
    rows: slice,
    seen: Seen,
    squares: Tensor | None,
    reply: Tensor,
    terms: Tensor,
) -> None:
    """Let the rule answer of some matrices.

    Args:
        batch: of the matrices.
        members, rows: the matrices and their owned channels in the batch.
        seen: of them, without the norms.
        squares: the batch's squared norms, (channels,), which become norms; None where they are not needed.
        reply, terms: of all of the batch's matrices, written.
    """
    if squares is not None:
        norms = squares[rows].sqrt_()
        if batch.inverse_roots is not None:
            norms *= batch.inverse_roots[rows]
        seen = seen._replace(norms=norms)
    update = batch.rule.owner_step(seen, batch.state_of(rows), batch.group)
    _write(update, batch.declared.reply.columns(batch.declared.reduce.low_rank), reply[rows])
    if update.terms is not None:
        _add_terms(update.terms, members, terms)


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
        brought = received[batch.first + k]
        if brought is not None:
            rows = slice(batch.rows[k].start - first, batch.rows[k].stop - first)
            mine = None if squares is None else squares[rows]
            receive(batch.matrices[k], low_rank[rows], mine, projection, brought, alpha)
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
    if list(members) == list(range(members[0], members[0] + len(members))):
        out[members[0] : members[0] + len(members)].add_(terms)
        return
    for rows, matrices in _rounds(tuple(members), out.device):
        out.index_add_(0, matrices, terms.index_select(0, rows))


@lru_cache(maxsize=256)
def _rounds(members: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Rows of terms and their matrices, on the device, in rounds in which no matrix occurs twice: in any order, sums
    are then those of the order given."""
    rounds: list[list[tuple[int, int]]] = []
    seen: Counter[int] = Counter()
    for row, k in enumerate(members):
        if seen[k] == len(rounds):
            rounds.append([])
        rounds[seen[k]].append((row, k))
        seen[k] += 1
    return [(columns[0], columns[1]) for columns in (to_device(r, torch.int64, device).t() for r in rounds)]
