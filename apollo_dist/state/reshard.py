"""Which rows of a low-rank parameter's state each rank has: those that the plan says, or even chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..exchange.channels import ChannelSet, held_channels
from ..sharding.dtensor import mesh_coordinates, shard_mesh
from ..sharding.grid import Runs, chunk
from ..sharding.regions import Range, joined
from .slots import PROJECTION

if TYPE_CHECKING:
    from ..exchange.plan import MatrixPlan
    from ..rules.base import State
    from ..sharding.local_shard import LocalShard
    from ..step.matrix import Matrix
    from .owned_tensor import Rows


@dataclass
class LowRank:
    """A low-rank parameter: its matrices in order, of which each has C channels, and the plan of each.

    A state by channel of all its matrices, one after the other, is one tensor of (matrices * C, width).
    """

    tensor: Tensor
    shard: LocalShard
    plans: list[MatrixPlan]
    matrices: list[Matrix]

    @property
    def channels(self) -> int:
        """C: of one matrix."""
        return self.matrices[0].spec.channels

    @property
    def declared(self) -> State:
        """The state that the rule declares for each of the matrices."""
        return self.matrices[0].declared.state

    def shape(self, name: str) -> tuple[int, int]:
        """Of a state by channel."""
        return self.channels * len(self.matrices), self.declared.channel[name]

    @property
    def by_matrix(self) -> dict[str, tuple[int, ...]]:
        """State that every rank with a part of a matrix has: its shape, of one matrix."""
        first = self.matrices[0]
        found: dict[str, tuple[int, ...]] = dict.fromkeys(self.declared.matrix, ())
        projection = first.declared.projection_shape(first.place.m, first.place.n)
        return found if projection is None else {**found, PROJECTION: projection}

    def rows_by_matrix(self, shape: tuple[int, ...]) -> Rows:
        """The rows of such a state, of that shape, that each rank has: matrices, or of one matrix its own rows."""
        if len(self.matrices) > 1 or not shape:
            return self.participants
        return tuple(tuple((0, shape[0]) for _ in ranges) for ranges in self.participants)

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """Of a DTensor's state by channel: the parameter's mesh, or where several axes shard that, those axes as one.

        Two axes may divide channels unevenly, which torch may put together wrongly (``sharding.dtensor.shard_group``).
        """
        return shard_mesh(self.tensor) if isinstance(self.tensor, DTensor) else None

    @property
    def placements(self) -> list[Placement]:
        """Of an even division of the rows on ``mesh``."""
        if not isinstance(self.tensor, DTensor):
            return []
        if self.mesh is not self.tensor.device_mesh:
            return [Shard(0)]
        return [p if isinstance(p, Replicate) else Shard(0) for p in self.tensor.placements]

    @cached_property
    def rows(self) -> Rows:
        """The rows that each rank of the shard group owns, as it stores them."""
        group = self.shard.group
        found = tuple(self._rows([_owned(plan, rank) for plan in self.plans]) for rank in range(group.size))
        mine = self._rows([matrix.channels.owned for matrix in self.matrices])
        assert found[group.rank] == mine, "the plan and this rank's state disagree"
        return found

    def _rows(self, owned: Sequence[ChannelSet]) -> tuple[Range, ...]:
        """The rows of some channels of each matrix."""
        shifted = ((e * self.channels, channels) for e, channels in enumerate(owned))
        return joined([(base + start, base + stop) for base, channels in shifted for start, stop in channels.ranges])

    @cached_property
    def participants(self) -> Rows:
        """For each rank of the shard group the matrices that it has elements of, whose norms it knows."""
        return tuple(
            tuple((e, e + 1) for e, plan in enumerate(self.plans) if rank in plan.participants)
            for rank in range(self.shard.group.size)
        )

    @property
    def even(self) -> bool:
        """Whether the owners' rows are the even chunks that a DTensor has by its placements."""
        return list(self.rows) == [((start, stop),) if start < stop else () for start, stop in self.chunks]

    @cached_property
    def chunks(self) -> Sequence[Range]:
        """The rows of each rank of the shard group in the even division: torch.chunk's."""
        mesh, rows = self.mesh, self.channels * len(self.matrices)
        process_group = self.shard.group.process_group
        if process_group is None:
            return [(0, rows)]
        assert mesh is not None
        axes = [axis for axis, placement in enumerate(self.placements) if not isinstance(placement, Replicate)]
        coordinates = mesh_coordinates(mesh)
        found = []
        for rank in dist.get_process_group_ranks(process_group):
            runs: Runs = ((0, rows),)
            for axis in axes:
                runs = chunk(runs, mesh.size(axis), coordinates[rank][axis])
            found.append(runs[0] if runs else (0, 0))
        return found


def _owned(plan: MatrixPlan, rank: int) -> ChannelSet:
    """The channels of a matrix that a rank owns, in the order in which it stores them."""
    alone, _ = held_channels(plan.partition, rank)
    mine = plan.shares.owners == rank
    shared = zip(plan.shares.starts[mine].tolist(), plan.shares.stops[mine].tolist(), strict=True)
    return alone + ChannelSet.merged(list(shared))
