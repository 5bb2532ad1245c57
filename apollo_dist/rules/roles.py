"""What a parameter is in its model, where a rule treats parameters differently."""

from __future__ import annotations

from dataclasses import dataclass

ROLE = "role"

LINEAR, EMBEDDING, HEAD = "linear map", "embedding", "output head"
QUERY, KEY, VALUE = "query projection", "key projection", "value projection"
FUSED = "queries, keys and values together"
NORM, BIAS = "norm", "bias"
OTHER = "something else"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        kind: one of the constants above. ``UNKNOWN`` for parameters without a name, and without a model.
        head_dim: of queries, keys, values and all together, how many rows a head has, where the model says it.
    """

    kind: str
    head_dim: int | None = None
