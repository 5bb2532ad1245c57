"""What Muon does to a matrix, or to blocks of its rows: Newton-Schulz iterations, and which rows are a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .roles import FUSED, KEY, QUERY, ROLE, VALUE

if TYPE_CHECKING:
    from .base import Group

COEFFICIENTS = 3.4445, -4.775, 2.0315  # a, b, c


def check_split(value: Any) -> str:
    """The check of ``split``."""
    sizes = isinstance(value, (tuple, list)) and len(value) > 0
    good = value is None or value == "head" or (sizes and all(type(rows) is int and rows > 0 for rows in value))
    return "" if good else 'None, "head", or how many rows each block has, such as (4096, 1024, 1024)'


def rows_of_blocks(m: int, n: int, group: Group) -> list[int]:
    """The rows of each block of an m x n matrix that is orthogonalized alone; ValueError if ``split`` does not fit."""
    split, role = group["split"], group[ROLE]
    if split is None or (split == "head" and role.kind not in (QUERY, KEY, VALUE, FUSED)):
        return [m]
    if split == "head":
        if not role.head_dim or m % role.head_dim:
            raise ValueError(
                f'split="head": it is not known how many rows a head of a matrix ({m}, {n}), {role.kind}, has. Pass '
                "the model, whose config says it, or the rows of each block: split=(rows, rows, ...)"
            )
        return [role.head_dim] * (m // role.head_dim)
    if sum(split) != m:
        raise ValueError(
            f"split={tuple(split)} has {sum(split)} rows, and a matrix of its group is ({m}, {n}): give matrices of "
            "other shapes a group without split"
        )
    return list(split)


def newton_schulz(matrix: Tensor, steps: int, eps: float) -> Tensor:
    """A matrix, or each of a stack (k, m, n), with singular values pushed towards 1, in its dtype."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    product = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
