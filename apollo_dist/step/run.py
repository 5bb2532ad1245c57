"""One step over what a build holds, readable top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..exchange.collectives import TERMS
from ..projections.cache import Phase
from ..rules import apollo as rule
from .shard_group import AdamTensor, ShardGroupStep


@dataclass
class Pending:
    """A step of a shard group before its weights change.

    Attributes:
        active: for each matrix whether it has a gradient.
        owned, replies, terms: what ``Batch.finish`` takes; for ``replies`` None where a rank has to hear of nothing.
    """

    active: list[bool]
    owned: list[Tensor | None]
    replies: list[Tensor | None]
    terms: Tensor


def step_shard_group(group_step: ShardGroupStep, seed: int) -> None:
    """One step of all matrices of a shard group: at most two collectives.

    Args:
        group_step: the matrices, their states and their plan.
        seed: of the projections.
    """
    pending = begin_step(group_step, seed, early=not group_step.plan.needs_exchange2)
    if group_step.plan.needs_exchange2:
        finish_step(group_step, pending)


def begin_step(group_step: ShardGroupStep, seed: int, *, early: bool = False) -> Pending:
    """The step of a shard group up to the update of the weights.

    Args:
        group_step, seed: as of ``step_shard_group``.
        early: update each batch's weights as soon as they can be, while its gradients are in the cache. Only without
            an exchange 2.
    """
    plan, exchange, matrices, projections = (
        group_step.plan,
        group_step.exchange,
        group_step.matrices,
        group_step.projections,
    )
    active = [m.begin_step() for m in matrices]
    projections.begin(seed, [m.refresh if on else None for m, on in zip(matrices, active, strict=True)])

    # Partial low-rank gradients travel to the owners of their channels.
    received: list[Any] = [None] * len(matrices)
    if plan.needs_exchange1:
        partials = [m.partial(projections.of(k, Phase.REDUCE), active[k]) for k, m in enumerate(matrices)]
        received = exchange.reduce_to_owners(partials)
        del partials

    # Owners: moments, scaling factors, norm terms.
    terms = torch.zeros((len(matrices), TERMS), dtype=group_step.dtype, device=group_step.device)
    owned: list[Tensor | None] = []
    replies: list[Tensor | None] = [None] * len(matrices)
    for batch in group_step.batches:
        grads = batch.gradients(active)
        owned += batch.owner_step(grads, projections, received, terms)
        if early:
            batch.finish(grads, owned, replies, terms)
        del grads
    del received

    # Scaling factors and norm terms travel back to the holders.
    if plan.needs_exchange2:
        shared = [m.shared_scale(scale) for m, scale in zip(matrices, owned, strict=True)]
        replies, terms = exchange.reply_to_holders(shared, terms)
    return Pending(active, owned, replies, terms)


def finish_step(group_step: ShardGroupStep, pending: Pending) -> None:
    """Limiter and update of the local weights, which ``begin_step`` left."""
    for batch in group_step.batches:
        batch.finish(batch.gradients(pending.active), pending.owned, pending.replies, pending.terms)


def step_adam(tensors: list[AdamTensor]) -> None:
    """AdamW for everything that is not low-rank, in batches that share hyperparameters and step."""
    batches: dict[tuple[Any, ...], list[AdamTensor]] = {}
    for t in tensors:
        if t.begin_step():
            key = (id(t.group), t.state["step"], t.holding.device, t.holding.compute_dtype)
            batches.setdefault(key, []).append(t)
    for batch in batches.values():
        group = batch[0].group
        weights = [t.holding.weight() for t in batch]
        work = [w.reshape(-1).to(t.holding.compute_dtype) for w, t in zip(weights, batch, strict=True)]
        rule.adamw(
            work,
            [t.gradient() for t in batch],
            [t.state["exp_avg"] for t in batch],
            [t.state["exp_avg_sq"] for t in batch],
            step=batch[0].state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
        for stored, updated in zip(weights, work, strict=True):
            if updated.data_ptr() != stored.data_ptr():
                stored.copy_(updated.view(stored.shape))
