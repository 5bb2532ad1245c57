"""Weights in INT8 in checkpoints: codes and scales, which models in any precision load, and weights in any precision.

A weight NAME in INT8 has the keys ``model.NAME.codes``, (m, n) in INT8, and ``model.NAME.scale``, (m,), and its
description says ``"stored": "int8"``. Its ``dtype`` is that of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.quantizer import dequantize
from .shards import Piece, Shards

if TYPE_CHECKING:
    from ..weights.int8 import Int8Rows
    from .opened import Contents

STORED, INT8 = "stored", "int8"


def keys_of(name: str) -> tuple[str, str]:
    """The keys of a weight's codes and of its scales."""
    return f"model.{name}.codes", f"model.{name}.scale"


def add(found: Contents, shape: tuple[int, ...], rows: Int8Rows) -> None:
    """Add the codes and scales that this rank holds of an INT8 weight.

    Args:
        found: gets them.
        shape: of the whole weight, (m, n).
        rows: of this rank.
    """
    first, (codes, scale) = rows.first // shape[1], rows.stored()
    found.rows[rows.name] = rows
    for key, tensor in zip(keys_of(rows.name), (codes, scale), strict=True):
        offsets = (first, 0)[: tensor.dim()]
        pieces = [Piece(offsets, tensor)] if tensor.numel() else []
        found.tensors[key] = Shards(shape[: tensor.dim()], pieces)


def convert(found: Contents, saved: Mapping[str, Any]) -> None:
    """Let weights that a checkpoint stores otherwise than the model be read as they are saved, and converted then.

    Args:
        found: the model; what is to be read changes.
        saved: the parameters of the checkpoint, by name.
    """
    for name, here in found.description["parameters"].items():
        was = saved[name].get(STORED)
        if was == here.get(STORED):
            continue
        if was == INT8:
            _from_int8(found, name, getattr(torch, saved[name]["dtype"]))
        else:
            _to_int8(found, name, getattr(torch, saved[name]["dtype"]), here["shape"])


def _from_int8(found: Contents, name: str, dtype: torch.dtype) -> None:
    """Read codes and scales for a weight that is no INT8 here; ``dtype`` is that of the scales."""
    wanted = found.tensors.pop(f"model.{name}", None)
    if wanted is None:  # it has no elements
        return
    pieces = [piece for piece in wanted.pieces if piece.tensor.numel()]
    codes = [Piece(p.offsets, torch.empty(p.tensor.shape, dtype=torch.int8)) for p in pieces]
    low = min((p.offsets[0] for p in pieces), default=0)
    high = max((p.offsets[0] + p.tensor.shape[0] for p in pieces), default=0)
    scale = torch.empty(high - low, dtype=dtype)
    of_codes, of_scale = keys_of(name)
    found.tensors[of_codes] = Shards(wanted.shape, codes)
    found.tensors[of_scale] = Shards(wanted.shape[:1], [Piece((low,), scale)] if pieces else [])

    def write() -> None:
        for piece, read in zip(pieces, codes, strict=True):
            first = piece.offsets[0] - low
            by = scale[first : first + len(read.tensor)]
            wide = torch.promote_types(torch.promote_types(dtype, piece.tensor.dtype), torch.float32)
            piece.tensor.detach().copy_(dequantize(read.tensor, by, wide))

    found.after_load.append(write)


def _to_int8(found: Contents, name: str, dtype: torch.dtype, shape: list[int]) -> None:
    """Read the values of a weight that is INT8 here; ``dtype`` is that of the checkpoint."""
    rows = found.rows[name]
    for key in keys_of(name):
        found.tensors.pop(key)
    values = torch.empty(rows.shape, dtype=dtype)
    pieces = [Piece((rows.first // shape[1], 0), values)] if values.numel() else []
    found.tensors[f"model.{name}"] = Shards(shape, pieces)
    found.after_load.append(partial(rows.load, values))


def values_of(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A whole weight in ``dtype``, rounded once."""
    return dequantize(codes, scale, torch.promote_types(dtype, torch.float32)).to(dtype)
