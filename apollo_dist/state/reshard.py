"""The even division of low-rank state, which does not depend on who owns what, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..distributed import meet
from ..exchange.collectives import device_for
from ..rules.base import State
from ..sharding.dtensor import places, shard_mesh
from ..sharding.grid import Runs, chunk
from ..sharding.local_shard import Holding, ShardGroup
from ..sharding.regions import Range
from ..step.matrix import Matrix
from ..step.shard_group import ShardGroupStep


@dataclass
class LowRank:
    """A low-rank parameter: its matrices, in order, and which of their channels each rank has in the even division."""

    tensor: Tensor
    holding: Holding
    numbers: list[int]  # of the matrices among the shard group's
    matrices: list[Matrix]
    shares: list[Range]

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
    def mesh(self) -> DeviceMesh | None:
        """Of a DTensor parameter's moments: the parameter's, or where several axes shard that, those axes as one.

        Two axes may divide channels unevenly, which torch may put together wrongly (``layout.dtensor.shard_group``).
        """
        return shard_mesh(self.tensor) if isinstance(self.tensor, DTensor) else None

    @property
    def placements(self) -> list[Placement]:
        """Of the moments, on ``mesh``."""
        if not isinstance(self.tensor, DTensor):
            return []
        if self.mesh is not self.tensor.device_mesh:
            return [Shard(0)]
        return [p if isinstance(p, Replicate) else Shard(0) for p in self.tensor.placements]

    def divide(self) -> None:
        """Find the shares, once all matrices are there."""
        self.shares = _shares(self)


def _shares(p: LowRank) -> list[Range]:
    """The channels of each rank of the shard group in the even division: torch.chunk's."""
    rows, group, mesh = p.channels * len(p.matrices), p.holding.group, p.mesh
    if group.process_group is None:
        return [(0, rows)]
    assert mesh is not None
    axes = [axis for axis, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]
    stands = places(mesh)
    shares = []
    for rank in dist.get_process_group_ranks(group.process_group):
        runs: Runs = ((0, rows),)
        for axis in axes:
            runs = chunk(runs, mesh.size(axis), stands[rank][axis])
        shares.append(runs[0] if runs else (0, 0))
    return shares


class EvenReshard:
    """Moves state between the owners of a shard group's channels and their even division, over that group.

    A piece is some rows of a local tensor. Both ends of a message list its pieces by parameter, matrix and channel.
    """

    def __init__(self, group_step: ShardGroupStep, parameters: Sequence[LowRank]) -> None:
        self.parameters, self.dtype, self.device = parameters, group_step.dtype, group_step.device
        self.group: ShardGroup = group_step.exchange.group
        # By the rank at the other end: pieces of what this rank owns (matrix, start, count), of its chunks.
        self._owned: list[list[tuple[Matrix, int, int]]] = [[] for _ in range(self.group.size)]
        self._chunked: list[list[tuple[int, int, int]]] = [[] for _ in range(self.group.size)]
        for i, p in enumerate(parameters):
            for e, (number, matrix) in enumerate(zip(p.numbers, p.matrices, strict=True)):
                base = e * p.channels
                for start, stop in sorted(matrix.channels.owned.ranges):
                    for rank, (low, high) in enumerate(p.shares):
                        for _, _, position, count in _overlap(matrix, start, stop, low - base, high - base):
                            self._owned[rank].append((matrix, position, count))
                mine = p.shares[self.group.rank]
                for s in group_step.plan.matrices[number].segments:
                    low, high = max(s.start + base, mine[0]), min(s.stop + base, mine[1])
                    if low < high:
                        self._chunked[s.owner].append((i, low - mine[0], high - low))

    @property
    def names(self) -> list[str]:
        """Names of the state by channel of any parameter, in order."""
        return list(dict.fromkeys(name for p in self.parameters for name in p.declared.channel))

    def having(self, name: str) -> list[LowRank]:
        """The parameters with a state of that name."""
        return [p for p in self.parameters if name in p.declared.channel]

    def to_chunks(self, name: str) -> list[tuple[LowRank, Tensor]]:
        """This rank's chunk of a state of every parameter that has it, (channels, width)."""
        found = []
        for p in self.having(name):
            start, stop = p.shares[self.group.rank]
            kwargs: dict[str, Any] = {"dtype": p.holding.compute_dtype, "device": p.holding.device}
            found.append((p, torch.empty((stop - start, p.shape(name)[1]), **kwargs)))
        self._move(self._of_owners(name), self._of_chunks(name, [chunk for _, chunk in found]))
        return found

    def to_owners(self, name: str, chunks: Sequence[Tensor]) -> None:
        """The reverse of ``to_chunks``: write a state of the parameters ``having`` it into the owners'."""
        self._move(self._of_chunks(name, chunks), self._of_owners(name))

    def _of_owners(self, name: str) -> list[list[Tensor]]:
        return [
            [m.state[name][at : at + count] for m, at, count in pieces if name in m.declared.state.channel]
            for pieces in self._owned
        ]

    def _of_chunks(self, name: str, chunks: Sequence[Tensor]) -> list[list[Tensor]]:
        known = {id(p): chunk for p, chunk in zip(self.having(name), chunks, strict=True)}
        numbered = {i: known[id(p)] for i, p in enumerate(self.parameters) if id(p) in known}
        return [[numbered[i][at : at + count] for i, at, count in pieces if i in numbered] for pieces in self._chunked]

    def _move(self, sent: list[list[Tensor]], targets: list[list[Tensor]]) -> None:
        if self.group.process_group is None:
            for source, target in zip(sent[0], targets[0], strict=True):
                target.copy_(source)
            return
        where = device_for(self.group.process_group, self.device)
        kind: dict[str, Any] = {"dtype": self.dtype, "device": where}
        flat = [piece.reshape(-1).to(**kind) for pieces in sent for piece in pieces]
        send = [sum(piece.numel() for piece in pieces) for pieces in sent]
        receive = [sum(piece.numel() for piece in pieces) for pieces in targets]
        received = torch.empty(sum(receive), **kind)
        out = torch.cat(flat) if flat else torch.empty(0, **kind)
        meet()
        dist.all_to_all_single(received, out, receive, send, group=self.group.process_group)
        at = 0
        for target in (piece for pieces in targets for piece in pieces):
            target.copy_(received[at : at + target.numel()].view(target.shape))
            at += target.numel()


def _overlap(matrix: Matrix, start: int, stop: int, low: int, high: int) -> list[tuple[int, int, int, int]]:
    """Where those of channels start .. stop in low .. high lie in the owned state: (start, stop, position, count)."""
    low, high = max(start, low), min(stop, high)
    if low >= high:
        return []
    return [(a, b, position, b - a) for a, b, position in matrix.channels.owned.positions(low, high)]
