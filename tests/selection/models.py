"""Models for the tests of the choice of matrices, and functions that say what is chosen."""

from __future__ import annotations

import copy

import torch
from torch import nn

from apollo_dist import APOLLO
from apollo_dist.selection.choice import low_rank_names, of_model


def linear(n: int = 64, m: int | None = None) -> nn.Linear:
    return nn.Linear(n, m or n, bias=False)


def chosen(model: nn.Module, rank: int = 4, **options) -> set[str]:
    return low_rank_names(of_model(model, rank, **options))


def left(model: nn.Module, rank: int = 4) -> set[str]:
    """The matrices that AdamW takes."""
    return {name for name, one in of_model(model, rank).items() if not one.low_rank and len(one.verdict.shape) > 1}


def stepped(optimizer: APOLLO) -> set[str]:
    """The low-rank matrices of an optimizer after a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return {name for name, slot in optimizer.named_state().items() if "last_norm" in slot}


class Block(nn.Module):
    """Attention and MLP under names that a test chooses."""

    def __init__(self, attention: str = "self_attn") -> None:
        super().__init__()
        self.add_module(attention, nn.ModuleDict({part: linear() for part in "qkvo"}))
        self.mlp = linear()


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None, **more: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        for name, module in more.items():
            self.add_module(name, module)
        self.head = head or linear(64, 100)


BLOCKS = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in (*(f"self_attn.{p}" for p in "qkvo"), "mlp")}


def grouped() -> nn.Module:
    """Blocks with a key projection of few rows."""
    block = nn.ModuleDict({"q": linear(), "k": linear(64, 16), "o": linear()})
    return Net(layers=nn.ModuleList([block, copy.deepcopy(block)]))


class Stack(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class GroupedExperts(Stack):
    """Says by its name what it holds."""
