"""Launches, bytes and arithmetic of what runs inside a ``with`` block, counted from the operations on the meta device.

Every operation of torch reads its tensors from memory and writes its results there; so do kernels of our own, of which
``apollo_dist.kernels.costs`` says what they read and write, since one of them takes many matrices. What is counted:

- bytes read: of every tensor argument that an operation reads. Those that it only overwrites (``copy_``, ``zero_``,
  ``fill_``, ``out=``) are not read, and expanded dimensions cost nothing.
- bytes written: of results that are no views, and of arguments that the operation's schema says it writes.
- launches: one for each operation, lists of tensors included; views and allocations are none. Operations on the CPU
  are none either; a copy from there is one, with the bytes that arrive.
- arithmetic: of matrix products two operations for each multiply and add, on tensor cores where both factors are bf16
  or fp16; of all others one operation for each number written.
- memory: the most bytes of new storages alive at one time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_dist.kernels.costs import LISTENERS, Cost

_FREE = {
    "view", "t", "transpose", "slice", "select", "unbind", "split", "split_with_sizes", "as_strided", "expand",
    "detach", "unsqueeze", "squeeze", "permute", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "diagonal", "unfold", "chunk", "narrow",
}  # fmt: skip
# Operations that take a tensor for its shape and dtype alone.
_READS_NOTHING = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
_OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_"}
# Arguments that a schema calls written, and which these operations write only where a gradient scaler is given.
_ONLY_READ = {"_fused_adam_": "grads", "_fused_adamw_": "grads"}
_LOW = (torch.bfloat16, torch.float16)


@dataclass
class Traffic:
    """What was counted; bytes, floating-point operations.

    Attributes:
        launches: operations with a kernel.
        read, written: bytes.
        tensor_core, fp32_products: arithmetic of matrix products.
        other: arithmetic of everything else.
        peak: most new bytes alive at one time.
        by_name: launches and bytes of each operation.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    tensor_core: int = 0
    fp32_products: int = 0
    other: int = 0
    peak: int = 0
    by_name: dict[str, list[int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def add(self, name: str, read: int, written: int, *, launches: int = 1) -> None:
        """Count an operation."""
        self.launches += launches
        self.read += read
        self.written += written
        entry = self.by_name.setdefault(name, [0, 0])
        entry[0] += launches
        entry[1] += read + written


class Count(TorchDispatchMode):
    """Counts in ``traffic`` until it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._alive = 0
        self._storages: Counter[int] = Counter()

    def __enter__(self) -> Count:
        LISTENERS.append(self._told)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        LISTENERS.remove(self._told)
        super().__exit__(*error)

    def _told(self, cost: Cost) -> None:
        """A launch of a kernel of our own."""
        self.traffic.add(cost.name, cost.read, cost.written)
        self.traffic.tensor_core += cost.tensor_core
        self.traffic.other += cost.other

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        out = func(*args, **kwargs)
        results = _tensors(out)
        self._follow(given, results)
        name = func._schema.name.split("::")[1]
        if name not in _FREE and any(t.device.type == "meta" for t in (*given, *results)):
            self._count(name, func, args, kwargs, results)
        return out

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        reads, writes = _accesses(name, func, args, kwargs, results)
        read, written = _bytes(reads), _bytes(writes)
        self.traffic.add(name, read, written)
        work, low = _product(name, reads)
        if not work:
            self.traffic.other += sum(t.numel() for t in writes)
        elif low:
            self.traffic.tensor_core += work
        else:
            self.traffic.fp32_products += work

    def _follow(self, given: list[Tensor], results: list[Tensor]) -> None:
        """New storages, and their end."""
        old = {t.untyped_storage()._cdata for t in given}
        for t in results:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if t.device.type != "meta" or key in old or self._storages[key]:
                continue
            self._storages[key] += 1
            self._alive += size
            self.traffic.peak = max(self.traffic.peak, self._alive)
            weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self._alive -= size
        self._storages[key] -= 1


def _accesses(name: str, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for i, declared in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(declared.name)
        found = _tensors(value)
        written = declared.alias_info is not None and declared.alias_info.is_write
        written = written and _ONLY_READ.get(name) != declared.name
        if written:
            writes += found
        # What a factor of 0 multiplies is not read.
        unread = i == 0 and (name in _READS_NOTHING or kwargs.get("beta") == 0)
        overwritten = unread or (written and (declared.kwarg_only or name in _OVERWRITES))
        if not overwritten:
            reads += found
    known = {id(t) for t in (*reads, *writes)}
    writes += [t for t in results if id(t) not in known]
    return reads, writes


def _product(name: str, reads: list[Tensor]) -> tuple[int, bool]:
    """Operations of a matrix product, and whether tensor cores take it; 0 for anything else."""
    if name not in {"mm", "bmm", "mv", "dot", "addmm", "addmm_", "addmv", "addmv_"}:
        return 0, False
    a, b = reads[-2:]
    columns = b.shape[-1] if b.ndim > 1 else 1
    return 2 * a.numel() * columns, a.dtype in _LOW and b.dtype in _LOW


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of those on the device, without what an expanded dimension repeats."""
    total = 0
    for t in tensors:
        if t.device.type == "meta":
            elements = 1
            for size, stride in zip(t.shape, t.stride(), strict=True):
                elements *= size if stride or not size else 1
            total += elements * t.element_size()
    return total
