"""From the optimizer's configuration to the optimizer, its learning-rate schedule, and what its state weighs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from apollo_dist import APOLLO, SCALE, SGD, AdamMini, APOLLOMini, Fira, GaLore, Muon
from apollo_dist import layerwise as in_backward
from apollo_dist.pretrain.optimizer_config import (
    AdamMiniConfig,
    ApolloConfig,
    ApolloMiniConfig,
    FiraConfig,
    GaLoreConfig,
    JsonOptimizer,
    MuonConfig,
    OptimizerConfig,
    ScaleConfig,
    SgdConfig,
)

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config

# In the order in which they are asked: APOLLO's options are APOLLO-Mini's and more, and Fira's are GaLore's.
_CLASSES: tuple[tuple[type[OptimizerConfig], Any], ...] = (
    (ApolloConfig, APOLLO),
    (ApolloMiniConfig, APOLLOMini),
    (FiraConfig, Fira),
    (GaLoreConfig, GaLore),
    (MuonConfig, Muon),
    (ScaleConfig, SCALE),
    (AdamMiniConfig, AdamMini),
    (SgdConfig, SGD),
)


def build_optimizer(
    config: OptimizerConfig | JsonOptimizer,
    model: nn.Module,
    seed: int,
    *,
    layerwise: bool = False,
    bf16_weights: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer for ``model`` as the engine has wrapped it.

    Args:
        config: of the optimizer.
        model: as the engine has wrapped it.
        seed: of the projections, and of stochastic rounding.
        layerwise: whether it updates inside the backward pass, which `Config` allows for those of this library.
        bf16_weights: whether the step updates bf16 weights, which are then rounded stochastically by default.
    """
    assert isinstance(config, OptimizerConfig)  # DeepSpeed makes the other kind itself
    options = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    kind = next((kind for of, kind in _CLASSES if isinstance(config, of)), None)
    if kind is not None:
        options.setdefault("stochastic_rounding", bf16_weights)
    if layerwise:
        return in_backward.attach(model, optimizer=kind, **options, seed=seed)
    if kind is not None:
        made: torch.optim.Optimizer = kind(model, **options, seed=seed)
        return made
    return torch.optim.AdamW(model.parameters(), **options)


def schedule(config: Config) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """Linear warm-up over ``warmup_steps``, then a cosine from 1 to ``min_lr_ratio`` at ``steps``; times the peak."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return lambda optimizer: LambdaLR(optimizer, factor)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state that this rank holds."""
    ours = getattr(optimizer, "state_bytes", None)
    if ours is not None:
        return int(ours())
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def adamw_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Bytes that AdamW in fp32 would hold on this rank: two numbers for each trainable element it updates.

    Counted in the optimizer's own groups, which under ZeRO 1 and 2 are this rank's flat partitions; under ZeRO-3, where
    those are empty between steps, in the model's partitions.
    """
    divided = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_tensor")]
    if divided:
        return sum(2 * 4 * int(p.ds_tensor.ds_numel) for p in divided)
    held = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    return sum(2 * 4 * local(p).numel() for p in held)
