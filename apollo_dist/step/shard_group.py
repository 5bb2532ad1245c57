"""All matrices of one shard group: their plan, their exchange, their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..exchange.collectives import Exchange
from ..exchange.plan import MatrixSpec, make_plan
from ..exchange.whole import WholeExchange
from ..kernels.table import STORED, choose
from ..projections.cache import ProjectionCache
from ..projections.gaussian import KINDS
from ..state.slots import PROJECTION, Slot, ready
from .batch import Batch, make_batches
from .matrix import Matrix
from .rows import check as check_rows

if TYPE_CHECKING:
    from ..rules.base import MatrixRule, Spec
    from ..sharding.local_shard import LocalShard
    from .specs import Place


class Entry(NamedTuple):
    """A matrix that a rule updates: where it is, what is exchanged of it, what the rule declares, its group."""

    shard: LocalShard
    place: Place
    spec: MatrixSpec
    declared: Spec
    rule: MatrixRule
    group: Mapping[str, Any]


def _known(declared: Spec, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels know what a rule asks for: a projection from the seed, and no low-rank update."""
    reduce, reply = declared.reduce, declared.reply
    return dtype in STORED and reduce.low_rank > 0 and reduce.projection in KINDS and not reply.low_rank_update


class ShardGroupStep:
    """All matrices of one shard group on one device: they share one plan and its collectives."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        group, device = entries[0].shard.group, entries[0].shard.device
        wide = any(entry.shard.compute_dtype == torch.float64 for entry in entries)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = device
        self.plan = make_plan([entry.spec for entry in entries], group.size)
        self.exchange = Exchange(self.plan, group, self.dtype, device)
        self.whole = WholeExchange(self.exchange)
        self._entries = entries
        self.matrices: list[Matrix] = []
        self.batches: list[Batch] = []

    def load(self, slots: Callable[[str], Slot], cache_projection: bool, kernels: str = "torch") -> None:
        """Make or check the states of the matrices.

        Args:
            slots: the state of a matrix by its name, empty if there is none yet.
            cache_projection: whether projections are kept until they are redrawn.
            kernels: "auto", "torch" or "triton", as of the optimizers.
        """
        for entry, channels in zip(self._entries, self.exchange.channels, strict=True):
            shard, place, spec, declared, rule, group = entry
            slot = slots(spec.name)
            shapes: dict[str, tuple[int, ...]] = {
                name: (channels.owned.count, width) for name, width in declared.state.channel.items()
            }
            shapes |= dict.fromkeys(declared.state.matrix, ())
            batched = tuple(shapes)  # the batches keep these
            numel = sum(tile.numel for tile in spec.tiles[shard.group.rank])
            shapes |= dict.fromkeys(declared.state.element, (numel,))
            projection = declared.projection_shape(place.m, place.n)
            if projection is not None:  # none where nothing of the matrix is
                shapes[PROJECTION] = projection if numel else (0, projection[1])
            kwargs: dict[str, Any] = {"dtype": shard.compute_dtype, "device": shard.device}
            dtypes = {PROJECTION: torch.bfloat16} if declared.reduce.projection_in_bfloat16 else {}
            ready(slot, spec.name, shapes, kwargs, [list(r) for r in channels.owned.ranges], dtypes, batched)
            chosen = choose(kernels, shard.device, shard.compute_dtype, known=_known(declared, shard.dtype))
            matrix = Matrix(place, spec, declared, rule, shard, channels, group, slot, chosen)
            if shard.rows is not None:
                check_rows(matrix)
            self.matrices.append(matrix)
            if chosen.together and self.dtype == torch.float32:
                self.exchange.add_up = chosen.add_up
        slices = [m.projection_slice for m in self.matrices]
        self.projections = ProjectionCache(slices, self.device, keep=cache_projection)
        self.batches = make_batches(self.matrices)
