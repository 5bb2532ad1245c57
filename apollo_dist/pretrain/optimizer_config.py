"""What a training run is told of its optimizer: the options of each, as ``config.py`` has those of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from apollo_dist.pretrain.fields import at_least, one_of, option, require


@dataclass(frozen=True)
class OptimizerConfig:
    """The options that every optimizer has."""

    name: ClassVar[str]
    lr: float = option("peak learning rate", 1e-3)
    weight_decay: float = option("decoupled weight decay", 0.0)

    def __post_init__(self) -> None:
        at_least(0, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SgdConfig(OptimizerConfig):
    """Options of ``apollo_dist.SGD``, which is ``torch.optim.SGD``."""

    name: ClassVar[str] = "sgd"
    lr: float = option("peak learning rate", 0.1)
    weight_decay: float = option("weight decay, which is added to the gradient", 0.0)
    momentum: float = option("of the running sum of gradients", 0.9)
    nesterov: bool = option("look one step ahead", False)
    stochastic_rounding: bool | None = option("of bf16 weights; default: with --precision bf16-pure", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(not self.nesterov or self.momentum > 0, "nesterov", self.nesterov, "false without a momentum")


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """Options of ``torch.optim.AdamW``, and the ones of all optimizers that have its moments."""

    name: ClassVar[str] = "adamw"
    betas: tuple[float, float] = option("decay of the first and the second moment", (0.9, 0.999))
    eps: float = option("added to the root of the second moment", 1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, eps=self.eps)
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")


@dataclass(frozen=True)
class StoredConfig(AdamWConfig):
    """How weights and moments are stored: options of this library's optimizers with moments of Adam's."""

    stochastic_rounding: bool | None = option("of bf16 weights; default: with --precision bf16-pure", None)
    adam_dtype: str | None = option("of moments where a parameter takes AdamW: bfloat16; default float32", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adam_dtype is not None:
            one_of(("bfloat16", "float32"), "adam_dtype", self.adam_dtype)


@dataclass(frozen=True)
class ApolloMiniConfig(StoredConfig):
    """Options of ``apollo_dist.APOLLOMini``: rank 1, one scaling factor per matrix."""

    name: ClassVar[str] = "apollo-mini"
    lr: float = option("peak learning rate", 1e-2)
    scale: float = option("multiplies the low-rank matrices' update by its root", 128.0)
    update_proj_gap: int = option("steps between two refreshes of the projections", 200)
    proj_type: str | None = option("entries of projections: std (normal, the default) or rademacher (signs)", None)
    embeddings: str | None = option("adamw (the default), or low_rank: embedding and head low-rank as well", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale > 0, "scale", self.scale, "positive")
        at_least(1, update_proj_gap=self.update_proj_gap)
        if self.proj_type is not None:
            one_of(("std", "rademacher"), "proj_type", self.proj_type)
        if self.embeddings is not None:
            one_of(("adamw", "low_rank"), "embeddings", self.embeddings)


@dataclass(frozen=True)
class ApolloConfig(ApolloMiniConfig):
    """Options of ``apollo_dist.APOLLO``."""

    name: ClassVar[str] = "apollo"
    rank: int = option("rank of the projections", 256)
    scale: float = option("multiplies the low-rank matrices' update by its root", 1.0)
    scale_type: str = option("channel: a scaling factor per channel; tensor: one per matrix", "channel")
    proj: str = option("random: from the seed; svd, subspace: singular directions of the gradient, or nearly", "random")
    refresh: str = option("together: all such directions in one step of a gap; spread: each in its own", "together")
    projection_dtype: str | None = option("of such projections; bfloat16, or that of the other states", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank)
        one_of(("channel", "tensor"), "scale_type", self.scale_type)
        one_of(("random", "svd", "subspace"), "proj", self.proj)
        one_of(("together", "spread"), "refresh", self.refresh)
        one_of(("bfloat16",), "projection_dtype", self.projection_dtype or "bfloat16")


@dataclass(frozen=True)
class GaLoreConfig(StoredConfig):
    """Options of ``apollo_dist.GaLore``."""

    name: ClassVar[str] = "galore"
    lr: float = option("peak learning rate", 1e-2)
    rank: int = option("rank of the projections", 256)
    scale: float = option("alpha: multiplies the update of low-rank matrices", 0.25)
    update_proj_gap: int = option("steps between two refreshes of the projections", 200)
    proj: str = option("svd: leading singular directions of the gradient; subspace: nearly those; random", "svd")
    refresh: str = option("together: all projections in one step of a gap; spread: each in its own", "together")
    projection_dtype: str | None = option("of such projections; bfloat16, or that of the other states", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale > 0, "scale", self.scale, "positive")
        at_least(1, rank=self.rank, update_proj_gap=self.update_proj_gap)
        one_of(("svd", "subspace", "random"), "proj", self.proj)
        one_of(("together", "spread"), "refresh", self.refresh)
        one_of(("bfloat16",), "projection_dtype", self.projection_dtype or "bfloat16")


@dataclass(frozen=True)
class FiraConfig(GaLoreConfig):
    """Options of ``apollo_dist.Fira``."""

    name: ClassVar[str] = "fira"


@dataclass(frozen=True)
class MuonConfig(StoredConfig):
    """Options of ``apollo_dist.Muon``; betas and eps are those of its AdamW for embedding, head and norms."""

    name: ClassVar[str] = "muon"
    lr: float = option("peak learning rate", 2e-3)
    eps: float = option("added to the root of the second moment", 1e-8)
    momentum: float = option("decay of the momentum", 0.95)
    adjust_lr_fn: str = option("match_rms_adamw, for learning rates of AdamW; original", "match_rms_adamw")
    adam_lr: float | None = option("peak learning rate of what takes AdamW; default: lr", None)
    split: str | None = option("head: each head of queries, keys and values is orthogonalized alone", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        one_of(("match_rms_adamw", "original"), "adjust_lr_fn", self.adjust_lr_fn)
        one_of(("head",), "split", self.split or "head")
        require(self.adam_lr is None or self.adam_lr > 0, "adam_lr", self.adam_lr, "positive")


@dataclass(frozen=True)
class ScaleConfig(StoredConfig):
    """Options of ``apollo_dist.SCALE``; betas and eps are those of its AdamW for norms."""

    name: ClassVar[str] = "scale"
    eps: float = option("added to the root of the second moment, and the least root mean square", 1e-8)
    momentum: float | None = option("of matrices; default: 0.9 of the output head, none of others", None)
    adam_lr: float | None = option("peak learning rate of norms; default: lr", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.momentum is None or 0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(self.adam_lr is None or self.adam_lr > 0, "adam_lr", self.adam_lr, "positive")


@dataclass(frozen=True)
class AdamMiniConfig(StoredConfig):
    """Options of ``apollo_dist.AdamMini``, which finds the heads in the model."""

    name: ClassVar[str] = "adam-mini"
    eps: float = option("added to the root of the second moment", 1e-8)


@dataclass(frozen=True)
class JsonOptimizer:
    """The optimizer that DeepSpeed's JSON brings: its ``type`` and ``params``, as DeepSpeed will read them."""

    type: str
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """The type in the words of ``--optimizer``."""
        ours = {"APOLLO": "apollo", "APOLLOMini": "apollo-mini", "AdamMini": "adam-mini"}
        ours |= {"ApolloDistMuon": "muon", "ApolloDistSGD": "sgd", "ApolloDistAdamW": "adamw"}
        return ours.get(self.type, self.type.lower())


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    c.name: c
    for c in (
        ApolloConfig, ApolloMiniConfig, GaLoreConfig, FiraConfig, MuonConfig, ScaleConfig, AdamMiniConfig, SgdConfig,
        AdamWConfig,
    )
}  # fmt: skip
