"""A rank's part of a logical tensor, as ``torch.distributed.checkpoint`` (DCP) writes and reads it.

DCP asks three questions of anything in a state dict (``torch.distributed._checkpointable``): which rectangles it has to
write, which it wants to read, and where the tensor of one of them is. Answering them by hand, and not with DTensors,
lets any set of rectangles be saved, and be loaded into any other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType

from ..distributed import RankError, described, global_rank, known_to_all, rank_of
from ..sharding.local_shard import view_of

if TYPE_CHECKING:
    from ..sharding.regions import Box


@dataclass(frozen=True)
class Piece:
    """One rectangle: its place in the logical tensor, and the local tensor of that shape."""

    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The rectangle in DCP's words."""
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.tensor.shape)


class Shards:
    """The rectangles of one logical tensor that this rank holds.

    Several ranks may hold the same rectangle (replicas): it is written once.

    Args:
        shape: of the logical tensor.
        pieces: disjoint.
        writes: whether this rank has to write them; False where its values are not the ones to keep.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece], writes: bool = True) -> None:
        self.shape, self.pieces, self.writes = torch.Size(shape), list(pieces), writes

    @staticmethod
    def of(shape: Sequence[int], boxes: Sequence[Box], local: Tensor, name: str) -> Shards:
        """The boxes of a local tensor; ``name`` is for errors.

        Raises:
            ValueError: if the local tensor is not laid out as the boxes say.
        """
        if len(boxes) == 1 and local.shape == boxes[0].sizes:
            return Shards(shape, [Piece(boxes[0].offsets, local)])
        if not local.is_contiguous() or sum(b.numel for b in boxes) != local.numel():
            raise ValueError(f"{name}: the local tensor {tuple(local.shape)} is not a contiguous run of its parts")
        flat = local.view(-1)
        return Shards(shape, [Piece(b.offsets, view_of(flat, b.offset, b.sizes, b.strides)) for b in boxes])

    @staticmethod
    def whole(tensor: Tensor, writes: bool = True) -> Shards:
        """All of a tensor."""
        return Shards(tensor.shape, [Piece((0,) * tensor.dim(), tensor)], writes)

    @property
    def numel(self) -> int:
        """How many elements this rank holds."""
        return sum(piece.tensor.numel() for piece in self.pieces)

    def size(self) -> torch.Size:
        """The logical shape; DCP compares it with the saved one."""
        return self.shape

    def staged(self) -> Shards:
        """The same with copies of what is to be written, on the CPU, for writing while training goes on."""
        pieces = [Piece(p.offsets, p.tensor.detach().to("cpu", copy=True)) for p in self.pieces if self.writes]
        return Shards(self.shape, pieces, self.writes)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, piece.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(piece.chunk, TensorProperties(dtype=piece.tensor.dtype), self.shape),
            )
            for piece in self.pieces
            if self.writes and piece.tensor.numel()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [piece.chunk for piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for piece in self.pieces:
            if torch.Size(piece.offsets) == index.offset:
                return piece.tensor.detach()
        raise ValueError(f"no part of {index.fqn} at {index.offset}")


class _SavePlanner(DefaultSavePlanner):
    """DCP's, which asks only tensors where their parts are, for ``Shards``."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        shards: Shards = self.state_dict[index.fqn]
        return shards.__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    """DCP's, for ``Shards``; besides, every element that is asked for must be in the checkpoint, once.

    DCP leaves elements that no rank saved as they were, in silence.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        plan = create_default_local_load_plan(self.state_dict, self.metadata)
        found = dict.fromkeys(self.state_dict, 0)
        for item in plan.items:
            found[item.dest_index.fqn] += math.prod(item.lengths)
        for name, shards in self.state_dict.items():
            if found[name] != shards.numel:
                raise ValueError(f"the checkpoint holds {found[name]} of the {shards.numel} elements wanted of {name}")
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        shards: Shards = self.state_dict[index.fqn]
        return shards.__get_tensor_shard__(index)


def write(folder: Path, tensors: dict[str, Shards], group: dist.ProcessGroup | None) -> None:
    """Write ``tensors`` into ``folder`` in DCP's format, each rank what it holds; collective.

    Raises:
        ValueError: on all ranks, if writing fails on any, or if the parts do not cover every tensor exactly once.
    """
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = FileSystemWriter(folder)
    _run(
        group, lambda: state_dict_saver.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    )


def read(folder: Path, tensors: dict[str, Shards], group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors`` in place from a folder in DCP's format, whoever wrote it; collective.

    Values are converted to the dtype of the tensor that they are read into.

    Raises:
        ValueError: on all ranks, if reading fails on any, or if an element is not in the checkpoint.
    """
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = FileSystemReader(folder)
    _run(
        group,
        lambda: state_dict_loader.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group),
    )


def _run(group: dist.ProcessGroup | None, work: Callable[[], object]) -> None:
    alone = not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings() if alone else nullcontext():
        if alone:  # DCP warns of that
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            work()
        except CheckpointException as error:  # a BaseException, which ends a process past every handler
            failures = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
            mine = failures.get(rank_of(group))
            if isinstance(mine, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
                raise known_to_all(mine, group) from error
            if mine is not None:  # of DCP's many types
                raise known_to_all(ValueError(described(mine)), group) from error
            first = min(failures)
            raise known_to_all(RankError.of(global_rank(first, group), described(failures[first])), group) from error
