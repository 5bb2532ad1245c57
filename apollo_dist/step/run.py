"""One step of a shard group, readable top to bottom: reduce, exchange, own, exchange, apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..projections.slices import Phase
from .apply import apply, shared_reply
from .own import answer_with_factors, own
from .reduce import partials
from .whole import refresh_projections, step_whole

if TYPE_CHECKING:
    from ..exchange.messages import Answer, Partial, Received
    from .shard_group import ShardGroupStep


@dataclass
class Pending:
    """A step of a shard group before its weights change.

    Attributes:
        active: for each matrix whether it has a gradient.
        owned, replies, terms, seed: what ``apply`` takes; for ``replies`` None where a rank has to hear of nothing.
    """

    active: list[bool]
    owned: list[Tensor | None]
    replies: list[Tensor | Answer | None]
    terms: Tensor
    seed: int


def step_shard_group(group_step: ShardGroupStep, seed: int) -> None:
    """One step of all matrices of a shard group: at most three collectives, and those of whole matrices.

    Args:
        group_step: the matrices, their states and their plan.
        seed: of the projections, and of stochastic rounding.
    """
    early = not (group_step.plan.needs_exchange2 or group_step.plan.first_term_places)
    finish_step(group_step, begin_step(group_step, seed, early=early), early=early)


def begin_step(group_step: ShardGroupStep, seed: int, *, early: bool = False) -> Pending:
    """The step of a shard group up to the update of the weights.

    Args:
        group_step, seed: as of ``step_shard_group``.
        early: update each batch's weights as soon as they can be, while its gradients are in the cache. Only without
            an exchange 2, and without terms that are summed before it.
    """
    plan, exchange, matrices = group_step.plan, group_step.exchange, group_step.matrices
    projections = group_step.projections
    active = [m.begin_step() for m in matrices]
    for m, on in zip(matrices, active, strict=True):
        if on:
            m.element_step()
    refresh_projections(group_step, active, seed)
    refreshes = [m.refresh if on else None for m, on in zip(matrices, active, strict=True)]
    stored = {k: m.stored_projection for k, m in enumerate(matrices) if m.spec.shared_state and active[k]}
    projections.begin(seed, refreshes, stored)

    # Parts of R and of squared norms travel to the owners of their channels.
    received: list[Received | None] = [None] * len(matrices)
    if plan.needs_exchange1:
        received = list(exchange.reduce_to_owners(_of_buckets(group_step, active)))

    # Owners: state, what they answer of each channel, terms.
    terms = torch.zeros((len(matrices), plan.term_columns), dtype=group_step.dtype, device=group_step.device)
    owned: list[Tensor | None] = []
    replies: list[Tensor | Answer | None] = [None] * len(matrices)
    made: dict[int, list[Tensor]] = {}
    for batch in group_step.batches:
        if batch.declared.reduce.whole:
            owned += [None] * len(batch.matrices)
            continue
        reduced = batch.reduced(active)
        owned += own(batch, reduced, projections, received, terms, made)
        if early:
            answer_with_factors(batch, active, owned, projections, terms, made)
            apply(batch, batch.carriers(active, reduced), owned, replies, projections, terms, seed)
            owned[batch.first :] = [None] * len(batch.matrices)  # low-rank updates are large
        del reduced
    del received

    # Terms are summed, before answers travel that depend on them or with those that do not.
    if not early:
        terms = exchange.sum_first_terms(terms)
        for batch in group_step.batches:
            answer_with_factors(batch, active, owned, projections, terms, made)
    if plan.needs_exchange2:
        shared = [shared_reply(m, reply) for m, reply in zip(matrices, owned, strict=True)]
        replies, terms = exchange.reply_to_holders(shared, terms, made)
    return Pending(active, owned, replies, terms, seed)


def _of_buckets(group_step: ShardGroupStep, active: Sequence[bool]) -> Callable[[int], dict[int, Partial]]:
    """A function that makes what this rank has for a bucket of exchange 1, called for each in order."""
    sending = [group_step.exchange.sending(bucket) for bucket in range(group_step.plan.buckets)]
    last = {k: bucket for bucket, members in enumerate(sending) for k in members}
    kept: dict[int, Partial] = {}  # a matrix is projected once, also where several buckets take a part of it

    def make(bucket: int) -> dict[int, Partial]:
        new = [k for k in sending[bucket] if k not in kept]
        # What is made in one call is kept together.
        for ends in (True, False):
            members = {k: group_step.matrices[k] for k in new if (last[k] == bucket) == ends}
            kept.update(partials(members, lambda k: group_step.projections.of(k, Phase.REDUCE), active))
        return {k: kept.pop(k) if last[k] == bucket else kept[k] for k in sending[bucket]}

    return make


def finish_step(group_step: ShardGroupStep, pending: Pending, *, early: bool = False) -> None:
    """The factors of whole matrices, and the update of the local weights, which ``begin_step`` left.

    Args:
        group_step: the matrices.
        pending: what ``begin_step`` returned.
        early: whether it has updated what could be.
    """
    for batch in group_step.batches:
        if early or batch.declared.reduce.whole:
            continue
        carriers = batch.carriers(pending.active)
        apply(batch, carriers, pending.owned, pending.replies, group_step.projections, pending.terms, pending.seed)
    step_whole(group_step, pending.active, pending.seed)
