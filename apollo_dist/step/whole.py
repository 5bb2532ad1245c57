"""What a step does with whole matrices at one owner: refreshes of stored projections, and rules that need a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.philox import words_of
from ..projections.gaussian import gaussian
from ..projections.orthonormal import leading_directions
from ..state.slots import PROJECTION, STEP
from .apply import update

if TYPE_CHECKING:
    from .matrix import Matrix
    from .shard_group import ShardGroupStep


def refresh_projections(group_step: ShardGroupStep, active: Sequence[bool], seed: int) -> None:
    """Make the projections anew that are due, each by its owner, from the gradients of this step.

    All ranks must know which are due without asking each other, also those that hold nothing of a matrix, so its own
    steps without a gradient count. It then keeps its projection; one that never had a gradient has none, and does not
    move before it is due again.

    Args:
        group_step: the matrices.
        active: for each whether it has a gradient.
        seed: of the projections.
    """
    matrices, exchange = group_step.matrices, group_step.whole
    count = max((int(m.state[STEP]) for m in matrices), default=0)
    due = [k for k, m in enumerate(matrices) if m.spec.shared_state and is_due(m.spec.name, m.group, count)]
    for chosen in exchange.rounds(due) if due else ():
        given = {k: matrices[k].stored_gradients() if active[k] else None for k in chosen if matrices[k].numel}
        gradients = exchange.gather(chosen, given)
        held = {k: matrices[k].state[PROJECTION] for k in chosen if matrices[k].numel}
        made = {}
        for k, grad in gradients.items():
            # An owner without a gradient keeps what there is.
            made[k] = _directions(matrices[k], grad, seed, count).to(held[k].dtype) if active[k] else held[k]
        exchange.share(chosen, made, held)


def is_due(name: str, group: Mapping[str, Any], count: int) -> bool:
    """Whether the stored projection of a matrix is made anew at a step.

    In the first of every ``update_proj_gap`` steps; or with ``refresh="spread"`` in the very first, and then in one of
    every gap's steps that follows from the matrix's name.

    Args:
        name: of the matrix.
        group: its options.
        count: the number of the step, from 1.
    """
    gap = group["update_proj_gap"]
    shift = words_of(f"apollo_dist refresh\0{name}")[0] % gap if group.get("refresh") == "spread" else 0
    return count == 1 or (count > 1 and (count - 1) % gap == shift)


def _directions(m: Matrix, grad: Tensor, seed: int, count: int) -> Tensor:
    def start(size: int) -> Tensor:
        return gaussian(seed, m.spec.name, count, size, grad.shape[1], dtype=torch.float64).t()

    subspace = m.declared.reduce.projection == "subspace"
    return leading_directions(grad, m.spec.rank, m.spec.name, start if subspace else None)


def step_whole(group_step: ShardGroupStep, active: Sequence[bool], seed: int) -> None:
    """The step of matrices that their rules need whole: to the owners, and the updates back, in rounds."""
    matrices, exchange = group_step.matrices, group_step.whole
    for chosen in exchange.rounds([k for k, m in enumerate(matrices) if m.spec.whole]):
        given = {k: matrices[k].sources() if active[k] else None for k in chosen if matrices[k].numel}
        gathered = exchange.gather(chosen, given)
        del given
        updates = {k: _whole_step(matrices[k], gathered.pop(k)) for k in list(gathered)}
        for k, tiles in exchange.scatter(chosen, updates).items():
            if active[k]:
                update(matrices[k], _finished(matrices[k], tiles), seed)


def _whole_step(m: Matrix, matrix: Tensor) -> Tensor:
    """What a rule makes of X, in the dtype in which that travels."""
    return m.rule.whole_step(matrix.to(m.shard.compute_dtype), m.group).to(matrix.dtype)


def _finished(m: Matrix, tiles: Sequence[Tensor]) -> list[Tensor]:
    """U of the local tiles, in the compute dtype."""
    found = [tile.to(m.shard.compute_dtype) for tile in tiles]
    for tile, part in zip(m.tiles, found, strict=True):
        m.rule.finish(part, tile.channels(m.spec.by_rows)[0], (m.spec.m, m.spec.n), m.group)
    return found
