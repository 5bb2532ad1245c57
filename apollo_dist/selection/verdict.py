"""What the rules say about a parameter, and the words that they share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a parameter is a candidate for low rank.

    Attributes:
        name: canonical name.
        shape: logical shape.
        candidate: whether it is low-rank unless the rank is too large for it, or it is excluded.
        why: the reason, for the table and the log.
        matrix: whether it is a matrix or a stack of matrices at all. Convolution kernels are not.
        frozen: whether it does not require gradients, as far as is known. The choice does not depend on it.
        of_vocabulary: whether it is an embedding or an output head, which ``embeddings="low_rank"`` takes as well.
    """

    name: str
    shape: tuple[int, ...]
    candidate: bool
    why: str
    matrix: bool = True
    frozen: bool = False
    of_vocabulary: bool = False

    @property
    def numel(self) -> int:
        """How many elements the parameter has."""
        return math.prod(self.shape)

    @property
    def smaller_side(self) -> int:
        """The smaller side of the matrix, or of each matrix of a stack: the largest rank that it can take."""
        return min(self.shape[-2:])


NO_MATRIX = "fewer than two dimensions"
EMPTY = "has no elements"


def flat(name: str, shape: tuple[int, ...]) -> Verdict | None:
    """The verdict for what no rule has to look at: parameters that are no matrices; None for all others."""
    if len(shape) < 2:
        return Verdict(name, shape, False, NO_MATRIX, matrix=False)
    if 0 in shape:
        return Verdict(name, shape, False, EMPTY, matrix=False)
    if len(shape) > 3:
        return Verdict(name, shape, False, f"{len(shape)} dimensions", matrix=False)
    return None


# Words that say "output head" when they are a whole component of a name. ``multi_head_attention`` is none.
_HEAD = re.compile(
    r"((lm|lang|out|output|cls|class|classification|classifier|vocab|token|mlm|nsp|mtp|medusa|shared|pred|prediction"
    r"|reward|value|v|score|policy|task|aux|final|pretrain|pretraining)_)*heads?"
    r"|lm_out_heads?|classifiers?|unembed|unembedding|lm_logits|qa_outputs|logits",
    re.IGNORECASE,
)


def says_head(component: str) -> bool:
    """Whether a component of a name says that it is an output head."""
    return _HEAD.fullmatch(component) is not None
