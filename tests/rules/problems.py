"""Problems for the table of rules: a model with all that rules treat differently, and what each makes of it.

Gradients are the test's own, as in ``models.py``. Names are those of a LLaMA, so that roles follow from the structure:
an embedding, blocks of attention with grouped keys and values, biases, norms, a stack of experts, an output head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import apollo_dist

from ..models import Experts, Layer, product
from .references import Dense

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, VOCABULARY = 6, 2, 4, 10, 14, 34


class Table(nn.Embedding):
    """An embedding, called with the wanted gradients."""

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return product(self, wanted)


class Weight(nn.Module):
    """A norm weight in a module of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return product(self, wanted)


class Calling(nn.Module):
    """Gives its children their part of the wanted gradients, and sums what they return."""

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        total: Any = 0.0
        for name, child in self.named_children():
            inner = {key[len(name) + 1 :]: grad for key, grad in wanted.items() if key.startswith(f"{name}.")}
            if inner:
                total = total + (child(inner) if not isinstance(child, nn.ModuleList) else called(child, inner))
        return total


def called(blocks: nn.ModuleList, wanted: dict[str, Tensor]) -> Any:
    total: Any = 0.0
    for i, block in enumerate(blocks):
        inner = {key[len(f"{i}.") :]: grad for key, grad in wanted.items() if key.startswith(f"{i}.")}
        if inner:
            total = total + block(inner)
    return total


class Attention(Calling):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.q_proj = Layer(WIDTH, HEADS * HEAD_DIM)
        self.k_proj = Layer(WIDTH, KV_HEADS * HEAD_DIM)
        self.v_proj = Layer(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = Layer(HEADS * HEAD_DIM, WIDTH, bias=False)


class Mlp(Calling):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = Layer(WIDTH, HIDDEN, bias=False)
        self.down_proj = Layer(HIDDEN, WIDTH, bias=False)


class Decoder(Calling):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = Attention(config), Mlp(), Weight(WIDTH)


class Llama(Calling):
    """Two blocks; ``layers`` is what the engines wrap."""

    def __init__(self, seed: int = 0, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = SimpleNamespace(
            vocab_size=VOCABULARY, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM
        )
        self.config = config
        self.embed_tokens = Table(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Decoder(config), Decoder(config), Experts()])
        self.norm = Weight(WIDTH)
        self.lm_head = Layer(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def scale_form(name: str, shape: torch.Size) -> tuple[str, dict[str, Any]]:
    if len(shape) < 2:
        return "adam", {}
    return ("columns", {}) if "embed" in name else ("rows", {"momentum": 0.9} if "lm_head" in name else {})


def adam_mini_form(head_dim: int) -> Callable[[str, torch.Size], tuple[str, dict[str, Any]]]:
    """Queries and keys by heads of so many rows, biases with Adam, all else by rows."""

    def form(name: str, shape: torch.Size) -> tuple[str, dict[str, Any]]:
        if "bias" in name:
            return "adamw", {"decay": 0.0}
        if len(shape) < 2:
            return "blocks", {"elements": shape.numel(), "decay": 0.0}
        return "blocks", {"elements": shape[-1] * (head_dim if "q_proj" in name or "k_proj" in name else 1)}

    return form


def low_rank_form(**options: Any) -> Callable[[str, torch.Size], tuple[str, dict[str, Any]]]:
    """What the library chooses in ``Llama`` is low-rank, and all else takes Hugging Face's AdamW."""

    def form(name: str, shape: torch.Size) -> tuple[str, dict[str, Any]]:
        low = name.startswith("layers.") and len(shape) > 1
        return ("low_rank", {**LOW_RANK, **options}) if low else ("hf_adamw", {})

    return form


def muon_form(**options: Any) -> Callable[[str, torch.Size], tuple[str, dict[str, Any]]]:
    """Hidden matrices take Muon, and all else torch's AdamW; by ``heads`` queries, keys and values of so many rows."""
    heads = options.pop("heads", None)

    def form(name: str, shape: torch.Size) -> tuple[str, dict[str, Any]]:
        if not name.startswith("layers.") or len(shape) < 2:
            return "adamw", {}
        by_head = heads and any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        return "muon", {**options, **({"blocks": [heads] * (shape[0] // heads)} if by_head else {})}

    return form


@dataclass
class Case:
    """A rule: what makes the optimizer of a model, and what the reference makes of each parameter."""

    make: Callable[..., torch.optim.Optimizer]
    form: Callable[[str, torch.Size], tuple[str, dict[str, Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    rule: str = ""  # its name in parameter groups
    json: str | None = None  # and in DeepSpeed's JSON
    few: bool = False  # whether another case of the same rule is what runs under all layouts
    rounds: bool = False  # whether it rounds to bfloat16, so that float32's rounding shows where it decides

    def optimizer(self, model: nn.Module, attach: Any = None) -> Any:
        """The optimizer of a wrapped model; ``attach`` is what makes one that updates inside backward."""
        options = {**COMMON, **self.options}
        return self.make(model, **options) if attach is None else attach(model, optimizer=self.make, **options)

    def dense(self, weights: dict[str, Tensor], draw_dtype: torch.dtype = torch.float64) -> Dense:
        """The reference for whole weights by name."""
        forms = {name: self.form(name, w.shape) for name, w in weights.items()}
        betas = {key: self.options[key] for key in ("betas",) if key in self.options}
        return Dense(weights, forms, **COMMON, **betas, draw_dtype=draw_dtype)


COMMON = {"lr": 0.02, "weight_decay": 0.1}
LOW_RANK = {"rank": 3, "gap": 3}
RANDOM = {"rank": 5, "update_proj_gap": 3, "proj": "random"}  # some ranks hold fewer elements of a channel
SVD = {**RANDOM, "rank": 3, "proj": "svd"}
CASES = {
    "SCALE": Case(apollo_dist.SCALE, scale_form, rule="scale", json="SCALE"),
    "AdamMini": Case(apollo_dist.AdamMini, adam_mini_form(HEAD_DIM), {"betas": (0.9, 0.95)}, "adam_mini", "AdamMini"),
    "GaLore": Case(apollo_dist.GaLore, low_rank_form(rank=5, alpha=0.25), RANDOM, "galore", "GaLore", True),
    "Fira": Case(
        apollo_dist.Fira,
        low_rank_form(rank=5, alpha=0.25, rule="Fira"),
        {**RANDOM, "scale": 0.25},
        "fira",
        "Fira",
        True,
    ),
    "GaLore SVD": Case(apollo_dist.GaLore, low_rank_form(alpha=0.25, svd=True), SVD, "galore", "GaLore"),
    "Fira SVD": Case(apollo_dist.Fira, low_rank_form(alpha=1.0, rule="Fira", svd=True), SVD, "fira", "Fira"),
    "Fira SVD bf16": Case(
        apollo_dist.Fira,
        low_rank_form(alpha=0.25, rule="Fira", svd=True, rounded=True),
        {**SVD, "scale": 0.25, "projection_dtype": torch.bfloat16},
        "fira",
        few=True,
        rounds=True,
    ),
    "GaLore subspace": Case(
        apollo_dist.GaLore,
        low_rank_form(alpha=0.25, svd="subspace"),
        {**SVD, "proj": "subspace", "refresh": "spread"},
        "galore",
        "GaLore",
        True,
    ),
    "APOLLO SVD": Case(apollo_dist.APOLLO, low_rank_form(rule="APOLLO", svd=True), SVD, "apollo", "APOLLO", True),
    "Muon": Case(apollo_dist.Muon, muon_form(), {"ns_dtype": "state"}, "muon", "ApolloDistMuon"),
    "Muon bf16": Case(
        apollo_dist.Muon,
        muon_form(rounded=True),
        {"ns_dtype": "state", "exchange_dtype": "bfloat16"},
        "muon",
        few=True,
        rounds=True,
    ),
    "Muon heads": Case(
        apollo_dist.Muon,
        muon_form(heads=HEAD_DIM),
        {"ns_dtype": "state", "split": "head"},
        "muon",
        "ApolloDistMuon",
        few=True,
    ),
    "SGD": Case(
        apollo_dist.SGD, lambda name, shape: ("sgd", {"momentum": 0.9}), {"momentum": 0.9}, "sgd", "ApolloDistSGD"
    ),
    "AdamW": Case(apollo_dist.AdamW, lambda name, shape: ("adamw", {}), rule="adamw", json="ApolloDistAdamW"),
}
