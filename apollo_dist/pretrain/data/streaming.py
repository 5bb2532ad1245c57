"""Hugging Face datasets, streamed: each rank reads its own part, tokenises and packs it as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apollo_dist.pretrain.config import Config, DataConfig
from apollo_dist.pretrain.data.packed import Tokens, check_tokens
from apollo_dist.pretrain.data.tokenizer import Tokenizer


def open_dataset(config: DataConfig, split: str) -> Any:
    """The split as a ``datasets.IterableDataset``. ``config.dataset`` is a name on the hub or a local folder."""
    from datasets import load_dataset  # an optional dependency, slow to import

    return load_dataset(str(config.dataset), config.dataset_config, split=split, streaming=True)


class StreamData:
    """Training windows from this rank's part of a stream, in the stream's order; starts over at its end.

    The order is the dataset's own (C4 comes shuffled): a shuffle buffer could not be saved exactly. Unlike files, a
    stream is cut by documents, so which windows a step takes depends on the number of ranks.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, rank: int, world: int) -> None:
        self._config = config.data
        self._rank = rank
        self._world = world
        self._stream = self._open()
        self._tokenizer = tokenizer
        self._length = config.sequence_length
        self._vocabulary = config.model.vocab_size
        self._rows: Iterator[Any] | None = None
        self._left: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)  # tokens read but not handed out

    def take(self, count: int) -> Tensor:
        """See `TrainData`."""
        need = count * self._length + 1
        parts = [self._left]
        held = len(self._left)
        while held < need:
            parts.append(self._tokenizer.encode(self._next_text()))
            held += len(parts[-1])
        tokens = np.concatenate(parts)
        self._left = tokens[need - 1 :]  # the last token is the next window's first
        starts = [tokens[k * self._length : (k + 1) * self._length + 1] for k in range(count)]
        windows = np.stack(starts).astype(np.int64)
        check_tokens(windows, self._vocabulary, f"dataset {self._config.dataset}")
        return torch.from_numpy(windows)

    def state_dict(self) -> dict[str, object]:
        """See `TrainData`."""
        return {"stream": self._stream.state_dict(), "left": torch.from_numpy(self._left.astype(np.int64))}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """See `TrainData`."""
        left = state["left"]
        assert isinstance(left, Tensor)
        self._stream.load_state_dict(state["stream"])
        self._left = left.numpy().astype(np.uint32)
        self._rows = None

    def _open(self) -> Any:
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(open_dataset(self._config, self._config.train_split), self._rank, self._world)

    def _next_text(self) -> bytes:
        for _ in range(2):  # the rest of this pass over the data, then the next pass
            if self._rows is None:
                self._rows = iter(self._stream)
            row = next(self._rows, None)
            if row is not None:
                return text_of(row, self._config.text_key)
            self._stream = self._open()  # afresh: one that was resumed would start every pass where it was resumed
            self._rows = None
        raise ValueError("this rank's part of the dataset is empty: it has fewer documents than there are ranks")


def read_validation(
    config: DataConfig, tokenizer: Tokenizer, length: int, sequences: int | None
) -> tuple[Tokens, float]:
    """The first ``sequences`` windows' tokens of the validation split (all of it if None), and bytes per token.

    Every rank reads the same ones, so validation does not depend on the number of ranks. Held in memory.
    """
    need = None if sequences is None else sequences * length + 1
    parts: list[NDArray[np.uint32]] = []
    tokens = size = 0
    for row in open_dataset(config, config.validation_split):
        text = text_of(row, config.text_key)
        parts.append(tokenizer.encode(text))
        tokens += len(parts[-1])
        size += tokenizer.measure(text)
        if need is not None and tokens >= need:
            break
    if not parts:
        raise ValueError(f"split {config.validation_split!r} of dataset {config.dataset!r} is empty")
    return np.concatenate(parts)[:need], size / tokens


def text_of(row: Any, key: str) -> bytes:
    """The UTF-8 text of a dataset's row."""
    text = row.get(key)
    if not isinstance(text, str):
        keys = ", ".join(map(str, row))
        raise ValueError(f"a row of the dataset has no text under the key {key!r}, only {keys} (--data.text_key)")
    return text.encode()
