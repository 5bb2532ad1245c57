"""The matrices in a parameter: whether a rule can take them, and what the exchange needs to know of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..exchange.plan import MatrixSpec
from ..sharding.local_shard import LocalShard, matrices
from ..sharding.names import matrix_name
from ..sharding.regions import Tile, tiles_in_blocks

if TYPE_CHECKING:
    from ..rules.base import MatrixRule, Spec


def exchanged(name: str, m: int, n: int, declared: Spec, tiles: tuple[tuple[Tile, ...], ...]) -> MatrixSpec:
    """What the exchange needs to know of an m x n matrix for which a rule declared ``declared``.

    Where a block of rows is one channel, the exchange sees a matrix in which such a block is one row.
    """
    block = declared.reduce.block
    if block > 1:
        assert m % block == 0 and declared.reduce.axis == "rows" and not declared.reduce.low_rank
        m, n, tiles = m // block, n * block, tiles_in_blocks(tiles, n, block)
    return MatrixSpec(
        name=name,
        m=m,
        n=n,
        by_rows=declared.reduce.by_rows(m, n),
        rank=declared.reduce.low_rank,
        channel_norms=declared.reduce.channel_norms,
        channel_scales=declared.reply.scale,
        terms=declared.terms,
        state=tuple(declared.state.channel.values()),
        matrix_state=len(declared.state.matrix),
        element_state=len(declared.state.element),
        tiles=tiles,
        low_rank_update=declared.reply.low_rank_update,
        terms_first=declared.reply.residual,
        whole=declared.reduce.whole,
        whole_in_bfloat16=declared.reduce.whole_in_bfloat16,
        shared_state=math.prod(declared.projection_shape(m, n) or (0,)),
        shared_in_bfloat16=declared.reduce.projection_in_bfloat16,
    )


@dataclass(frozen=True)
class Place:
    """Where a matrix is in its parameter: the ``index``-th one, m x n."""

    index: int
    m: int
    n: int


def specs_of(shard: LocalShard, rule: MatrixRule, group: Mapping[str, Any]) -> list[tuple[Place, MatrixSpec, Spec]]:
    """The matrices in one parameter, each with what is exchanged of it, and what the rule declares for it."""
    count, m, n = matrices(shard.shape)
    declared = rule.spec(m, n, group)
    found = []
    for i in range(count):
        name, tiles = matrix_name(shard.name, i, count), shard.partition.tiles(i, m, n)
        found.append((Place(i, m, n), exchanged(name, m, n, declared, tiles), declared))
    return found


def check_matrix(name: str, shape: tuple[int, ...], rank: int) -> None:
    """Raise ValueError unless a parameter of this shape can be low-rank at this rank."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"{name} of shape {shape} is in a group with rank={rank}, but only matrices (m, n) and stacks of them "
            "(E, m, n) can be low-rank: move it to a group without rank, which takes AdamW"
        )
    _, m, n = matrices(shape)
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} is larger than {name} of shape {shape}: its low-rank state would be larger than AdamW's. "
            f"Use rank <= {min(m, n)}, or give this matrix a group of its own with a smaller rank, "
            "or leave it to AdamW (a group without rank; exclude=... in param_groups)"
        )
