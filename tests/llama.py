"""A tiny real LlamaForCausalLM, and what one process with whole matrices makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .judge import assert_small
from .models import relative_error
from .reference import Reference
from .rules.references import Dense

RANK, GAP, VOCABULARY, LENGTH = 4, 3, 32, 8
STEPS, RATE = 6, 1e-2
# The ZeRO stages that are run, and those of them that are run with the optimizer on the CPU as well.
STAGES = (0, 1, 2, 3)
OFFLOAD = (1, 2, 3)


def optimizer_block(kind: str = "APOLLO", **params: Any) -> dict[str, Any]:
    """What the JSON holds; lists stand for tuples there."""
    return {"type": kind, "params": {"lr": RATE, "betas": [0.9, 0.999], "update_proj_gap": GAP, **params}}


def offloaded(config: dict[str, Any]) -> dict[str, Any]:
    """The same with the optimizer on the CPU."""
    zero = {**config["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    return {**config, "zero_optimization": zero}


def llama(seed: int = 0) -> nn.Module:
    """Two layers with 14 low-rank matrices; embedding, head and norms are not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY,
            max_position_embeddings=2 * LENGTH,
            # transformers 4.57 fills its cache of keys once more where the backward pass computes layers again.
            use_cache=False,
        )
    )  # fmt: skip


class WithTable(nn.Module):
    """A block with a table whose name could be a matrix's: only its module, an embedding, says that it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 8), "positions": nn.Embedding(5, 6)})])

    def forward(self, index: Tensor) -> Tensor:
        block = self.layers[0]
        return block["up"](block["positions"](index)).square().sum()


def low_rank_names(names: Iterable[str]) -> list[str]:
    """The attention and MLP matrices among the names of a ``llama``, spelled out."""
    names = [name for name in names if name.endswith("_proj.weight")]
    assert len(names) == 2 * 7
    return names


def tokens(step: int, rank: int, rows: int = 2) -> Tensor:
    """Token ids, (rows, LENGTH)."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)


def dense(
    batches: Sequence[Tensor],
    rates: Sequence[float],
    *,
    rank: int = RANK,
    prefix: str = "",
    adamw: Callable[[str], bool] = lambda name: False,
    decay: Callable[[str], float] = lambda name: 0.0,
    factor: float = 1.0,
    **options,
) -> dict[str, Tensor]:
    """The weights of a fresh ``llama`` after one process trained it on whole batches with ``tests/reference.py``.

    Args:
        batches: for each step the token ids of all ranks, (rows, LENGTH).
        rates: for each step the learning rate.
        rank: of the low-rank matrices.
        prefix: in front of the model's names, where it is a part of another module.
        adamw: which of the attention and MLP matrices are left to AdamW.
        decay: a parameter's weight decay.
        factor: what the gradients of the mean loss are multiplied by.
        options: of ``Reference``.
    """
    model = llama()
    weights = dict(model.named_parameters(prefix=prefix))
    ranks = {name: rank for name in low_rank_names(weights) if not adamw(name)}
    parts = [
        Reference(
            {name: w for name, w in weights.items() if decay(name) == value},
            ranks,
            weight_decay=value,
            update_proj_gap=GAP,
            draw_dtype=torch.float32,
            **options,
        )
        for value in sorted({decay(name) for name in weights})
    ]
    return trained(model, weights, parts, batches, rates, factor)


def trained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    parts: Sequence[Reference | Dense],
    batches: Sequence[Tensor],
    rates: Sequence[float],
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """The weights of a ``llama`` after dense references, each of a part of its weights, trained it on whole batches.

    Args:
        model: what is trained.
        weights: its parameters, by the names that the references know.
        parts: the references.
        batches: for each step the token ids of all ranks, (rows, LENGTH).
        rates: for each step the learning rate.
        factor: what the gradients of the mean loss are multiplied by.
    """
    for batch, rate in zip(batches, rates, strict=True):
        grads = torch.autograd.grad(model(input_ids=batch, labels=batch).loss, list(weights.values()))
        given = {name: grad * factor for name, grad in zip(weights, grads, strict=True)}
        for part in parts:
            part.lr = rate
            part.step({name: given[name] for name in part.weights})
            for name, weight in part.weights.items():
                weights[name].data.copy_(weight)
    return {name: weight for part in parts for name, weight in part.weights.items()}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights on every rank, also where ZeRO-3 partitions them."""
    import deepspeed

    named = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def whole_batches(mine: list[Tensor]) -> list[Tensor]:
    """What all ranks together saw at each step."""
    everyone: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [torch.cat(batch) for batch in zip(*everyone, strict=True)]


def errors(model: nn.Module, expected: dict[str, Tensor]) -> dict[str, float]:
    found = full_weights(model)
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in found}


def step_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """A list that grows by the learning rate of each call of ``step()``."""
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda used, *_: rates.append(used.param_groups[0]["lr"]))
    return rates


def assert_equal_to_one_process(cases: Mapping[str, dict[str, float] | str], tolerance: float = 1e-5) -> None:
    """Check the weights' errors of each case; where a run ended with a message, it fails with that."""
    for case, found in cases.items():
        assert_small(case, found, tolerance)
