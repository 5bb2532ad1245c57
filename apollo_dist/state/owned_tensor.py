"""A DTensor whose rows the ranks divide as the exchange plan says, not in the even chunks that placements mean.

The owners of a wide matrix's channels are chosen by the plan, so what a rank keeps of a moment is some ranges of its
rows. DTensor knows even chunks only, and moving rows into those would make ``state_dict()`` a collective. DCP asks a
tensor itself which rectangles it has (``torch.distributed._checkpointable``); here the answer is the rows that the
plan gives to this rank. So such a tensor is made, saved and loaded without communication between ranks, and it can be
loaded at any other number of ranks. Only reading the whole of it (``full_tensor``, ``redistribute``) is a collective,
as it is for every DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement
from torch.torch_version import TorchVersion

from ..distributed import device_for
from ..sharding.internals import require
from ..sharding.regions import Range

# The ranges of rows of each rank of a shard group, in the order in which the rank stores them. Two ranks may have the
# same rows, with equal values. Plain integers, so that a pickle needs no class for them.
Rows = tuple[tuple[Range, ...], ...]

_aten = torch.ops.aten
# What works on the rows of each rank alone, and gives a tensor of the same rows.
_BY_ROW = {
    getattr(_aten, name).default
    for name in ("alias", "clone", "detach", "_to_copy", "empty_like", "zeros_like", "ones_like")
}  # fmt: skip


# From 2.10 to 2.12 torch runs operations of DTensors, also of classes made of them, without ``__torch_dispatch__``.
_FAST_PATH = "2.10" <= TorchVersion(torch.__version__) < "2.13"
_METHODS_BY_ROW = {
    Tensor.clone, torch.clone, Tensor.detach, torch.detach, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous,
    torch.empty_like, torch.zeros_like, torch.ones_like,
}  # fmt: skip


class OwnedTensor(DTensor):
    """A DTensor of which each rank of one mesh axis holds the rows that ``rows`` says.

    ``to_local()`` gives this rank's rows, one range after the other. ``placements`` are those of an even division:
    torch's tools take from them how to divide a whole tensor that they load, which ``load_state_dict`` accepts as well.
    A tensor of shape () counts as one row.
    """

    # (mesh axis, rows): in __dict__, where pickles, copies and DCP's staging find it.
    _owned: tuple[int, Rows]

    @staticmethod
    def of(
        local: Tensor,
        shape: Sequence[int],
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        rows: Rows,
    ) -> OwnedTensor:
        """Wrap this rank's rows, which stay what they are: no copy and no communication.

        Args:
            local: (this rank's rows, ...); for shape () of shape ().
            shape: of the whole tensor.
            mesh: whose one sharding axis has a rank for each entry of ``rows``.
            placements: of an even division of the tensor on ``mesh``.
            rows: of each rank.
        """
        (axis,) = [axis for axis in range(mesh.ndim) if mesh.size(axis) == len(rows) and _divides(placements[axis])]
        if not shape:
            placements = [Replicate()] * mesh.ndim
        return OwnedTensor._wrap(local, as_dtensor(local, shape, mesh, placements)._spec, (axis, rows))

    @classmethod
    def _wrap(cls, local: Tensor, spec: Any, owned: tuple[int, Rows]) -> OwnedTensor:
        made: OwnedTensor = cls(_at_storage_start(local), spec, requires_grad=False)
        made._local_tensor, made._owned = local, owned
        return made

    @property
    def rows(self) -> Rows:
        """The rows of each rank of the mesh axis."""
        return self._owned[1]

    @property
    def mine(self) -> tuple[Range, ...]:
        """The rows of this rank."""
        return self.rows[self.device_mesh.get_local_rank(self._owned[0])]

    # What DCP asks.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        inner = tuple(self.shape[1:])
        return [
            ChunkStorageMetadata(
                offsets=torch.Size((start, *(0 for _ in inner)) if self.dim() else ()),
                sizes=torch.Size((stop - start, *inner) if self.dim() else ()),
            )
            for start, stop in self.mine
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if not self.dim():
            return self._local_tensor
        row = 0
        for start, stop in self.mine:
            if index.offset is None or index.offset[0] == start:
                return self._local_tensor[row : row + stop - start]
            row += stop - start
        raise ValueError(f"this rank has no rows of {index.fqn} that begin at {index.offset}")

    # Reading the whole: collectives.

    def full_tensor(self, **_: Any) -> Tensor:
        """The whole tensor, on every rank. A collective over the ranks that divide it."""
        group = self.device_mesh.get_group(self._owned[0])
        local = self._local_tensor.detach()
        counts = [sum(stop - start for start, stop in ranges) for ranges in self.rows]
        inner = tuple(self.shape[1:])
        where = device_for(group, local.device)
        padded = torch.zeros((max(counts), *inner), dtype=local.dtype, device=where)
        rank = self.device_mesh.get_local_rank(self._owned[0])
        padded[: counts[rank]] = local.to(where).reshape(-1, *inner)[: counts[rank]]
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        whole = padded.new_zeros(self.shape).reshape(-1, *inner)
        for part, ranges in zip(gathered, self.rows, strict=True):
            at = 0
            for start, stop in ranges:
                whole[start:stop] = part[at : at + stop - start]
                at += stop - start
        return whole.reshape(self.shape).to(local.device)

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **options: Any,
    ) -> DTensor:
        """A DTensor with the given placements, by default replicated. A collective over the ranks that divide it."""
        replicated = [Replicate()] * self.device_mesh.ndim
        whole = DTensor.from_local(self.full_tensor(), self.device_mesh, replicated, run_check=False)
        if placements is None or all(isinstance(placement, Replicate) for placement in placements):
            return whole
        return whole.redistribute(device_mesh, placements, **options)

    # What torch's tools do with a state: copies, also to other devices.

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        first = args[0] if args else None
        if func in _BY_ROW and isinstance(first, OwnedTensor):
            return _like(first, func(first._local_tensor, *args[1:], **options))
        if func is _aten.new_empty.default and isinstance(first, OwnedTensor) and tuple(args[1]) == tuple(first.shape):
            return _like(first, first._local_tensor.new_empty(first._local_tensor.shape, **options))
        if func is _aten.copy_.default and all(isinstance(one, OwnedTensor) for one in args[:2]):
            target, source = args[:2]
            if target._owned == source._owned:
                target._local_tensor.copy_(source._local_tensor)
                return target
        raise NotImplementedError(
            f"{func} does not know tensors whose rows are divided by their owners, as APOLLO's low-rank moments are: "
            "take this rank's rows with to_local(), or on all ranks together the whole with full_tensor()"
        )

    if _FAST_PATH:

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            """What ``__torch_dispatch__`` does, where torch does not call it for a class of its DTensors."""
            options = dict(kwargs or {})
            first = args[0] if args else None
            with torch._C.DisableTorchFunctionSubclass():
                if func in _METHODS_BY_ROW and isinstance(first, OwnedTensor):
                    return _like(first, func(first._local_tensor, *args[1:], **options))
                if func is Tensor.new_empty or func is Tensor.copy_:
                    return cls.__torch_dispatch__(getattr(_aten, func.__name__).default, types, args, options)
                result = func(*args, **options)
                if type(result) is DTensor:  # of the rows of an even division, which these are not
                    return cls.__torch_dispatch__(func, types, (), {})
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedTensor:
        made = memo[id(self)] = _like(self, self._local_tensor.detach().clone())
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OwnedTensor(shape={tuple(self.shape)}, rows={self.mine}, local_tensor={self._local_tensor})"


def _like(tensor: OwnedTensor, local: Tensor) -> OwnedTensor:
    """The same rows of another local tensor, which may have another dtype."""
    spec = tensor._spec
    if local.dtype != tensor.dtype:
        spec = as_dtensor(local, tensor.shape, tensor.device_mesh, tensor.placements)._spec
    return OwnedTensor._wrap(local, spec, tensor._owned)


def as_dtensor(local: Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A local tensor as it is, live, as a rank's part of a contiguous DTensor of that shape; no communication."""
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    first = _at_storage_start(local)
    made = DTensor.from_local(first, mesh, list(placements), run_check=False, shape=size, stride=stride)
    require(made, "_local_tensor", "_spec")
    if first is not local:
        made._local_tensor = local
    return made


def _at_storage_start(local: Tensor) -> Tensor:
    """A tensor to make a DTensor of: ``local``, or where that does not begin its storage, one of the same form.

    A DTensor takes over its local tensor's offset into a storage, but has no storage: copies of it would fail.
    """
    return local if local.storage_offset() == 0 else local.new_empty(local.shape)


def _divides(placement: Placement) -> bool:
    return not isinstance(placement, Replicate)


# Lets torch.load(weights_only=True) read it, as torch does for DTensor.
torch.serialization.add_safe_globals([OwnedTensor])
