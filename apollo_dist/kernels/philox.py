"""Philox 4x32-10: random words that are a function of a counter and a key, so any rank generates any of them alone.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. torch's own generators do not serve here:
the CPU's and CUDA's streams differ, and CUDA's depends on the size of the GPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32 with 10 rounds: four random words for each 128-bit counter.

    Args:
        counter: four int64 tensors of broadcastable shapes, each value in [0, 2**32).
        key: two int64 tensors, values in [0, 2**32), of shapes that broadcast with the counter's and are no larger than
            those of its last two words.

    Returns:
        Four int64 tensors, values in [0, 2**32), bit-exact on every device.
    """
    c0, c1, c2, c3 = counter
    rounds = torch.arange(_ROUNDS, device=c0.device)
    keys = [((k[..., None] + rounds * weyl) & MASK32).unbind(-1) for k, weyl in zip(key, _WEYL, strict=True)]
    for k0, k1 in zip(*keys, strict=True):
        # int64 products wrap modulo 2**64, and the shift is arithmetic: the upper halves of c0 and c2 are masked, those
        # of c1 and c3 are left, for what is made of them is masked. Only what broadcasts is not done in place.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(MASK32)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(MASK32)
        c1, c3 = p1, p0
    return c0, c1.bitwise_and_(MASK32), c2, c3.bitwise_and_(MASK32)


def words_of(text: str) -> tuple[int, int, int, int]:
    """128 bits that stand for ``text``, as four words of 32 bits: two serve as a key, two as a part of the counter."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return words[0], words[1], words[2], words[3]
