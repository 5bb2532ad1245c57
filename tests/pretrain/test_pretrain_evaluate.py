"""Validation is the exact token-weighted mean, however the sequences split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from apollo_dist.pretrain.data.packed import Windows
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.evaluate import Evaluation, evaluate, spread
from apollo_dist.pretrain.losses import token_losses

LENGTH, VOCABULARY = 8, 11


class TableEngine:
    """Logits that depend on the token alone; counts forward passes."""

    def __init__(self) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
        self.passes: list[int] = []
        self.training = True

    def train(self, mode: bool) -> None:
        self.training = mode

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        assert not self.training
        self.passes.append(len(tokens))
        return token_losses(self.table[tokens], targets)


class AloneRanks(Ranks):
    """One rank of several whose sums stay its own, so that the test adds them up."""

    def sum(self, values: object) -> list[float]:
        assert isinstance(values, Tensor)
        self.__dict__["sent"] = values.tolist()
        return [float(x) for x in values.tolist()] if values[1] else [0.0, 1.0, values[2]]


def data(sequences: int) -> Windows:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, sequences * LENGTH + 1).astype(np.uint16)
    return Windows([tokens], LENGTH, "test data", VOCABULARY)


def exact(windows: Windows, indices: list[int]) -> tuple[float, int]:
    batch = windows.batch(indices)
    logits = TableEngine().table[batch[:, :-1]].double()
    picked = logits.log_softmax(-1).gather(-1, batch[:, 1:, None])
    return -float(picked.sum()), picked.numel()


@pytest.mark.parametrize("wanted", [None, 1, 3, 7])
@pytest.mark.parametrize("micro", [1, 2, 4, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_count_every_token_once(world: int, micro: int, wanted: int | None) -> None:
    windows = data(7)
    total, passes = [0.0, 0.0, 0.0], []
    for rank in range(world):
        engine, ranks = TableEngine(), AloneRanks(rank, world, torch.device("cpu"))
        evaluate(engine, windows, micro, ranks, wanted, None)  # type: ignore[arg-type]
        total = [a + b for a, b in zip(total, ranks.__dict__["sent"], strict=True)]
        passes.append(len(engine.passes))
        assert engine.training
    nll, count = exact(windows, spread(7, wanted))
    assert total[1:] == [count, 0]
    assert total[0] == pytest.approx(nll, rel=1e-6)
    assert len(set(passes)) == 1, "forward passes are collectives under FSDP: every rank makes as many"


def test_the_mean_of_one_rank() -> None:
    windows = data(5)
    result = evaluate(TableEngine(), windows, 2, AloneRanks(0, 1, torch.device("cpu")), None, 2.0)  # type: ignore[arg-type]
    nll, count = exact(windows, list(range(5)))
    assert result.tokens == count
    assert result.loss == pytest.approx(nll / count, rel=1e-6)


def test_perplexity_and_bits_per_byte() -> None:
    result = Evaluation(loss=math.log(8), tokens=10, bytes_per_token=1.5)
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_byte == pytest.approx(2)
    assert Evaluation(1.0, 10, None).bits_per_byte is None
    assert Evaluation(1e4, 10, None).perplexity == math.inf


def test_chosen_windows_are_spread_over_all() -> None:
    assert spread(10, None) == spread(10, 99) == list(range(10))
    assert spread(10, 3) == [0, 3, 6]
