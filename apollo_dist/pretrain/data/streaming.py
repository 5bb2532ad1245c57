"""Hugging Face datasets, streamed: each rank reads its own part, tokenises and packs it as it comes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apollo_dist.pretrain.data.packed import Tokens, check_tokens

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config, DataConfig
    from apollo_dist.pretrain.data.tokenizer import Tokenizer


def open_dataset(config: DataConfig, split: str) -> Any:
    """The split as a ``datasets.IterableDataset``. ``config.dataset`` is a name on the hub or a local folder."""
    from datasets import load_dataset  # an optional dependency, slow to import

    return load_dataset(str(config.dataset), config.dataset_config, split=split, streaming=True)


class StreamData:
    """Training windows from this rank's part of a stream, in the stream's order; starts over at its end.

    The order is the dataset's own (C4 comes shuffled): a shuffle buffer could not be saved exactly. Unlike files, a
    stream is cut by documents, so which windows a step takes depends on the number of ranks; which documents have been
    read when a run resumes does not. See `ShardAssignment` for who reads which.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, rank: int, world: int) -> None:
        self._name = config.data.dataset
        self._text_key = config.data.text_key
        self._dataset = open_dataset(config.data, config.data.train_split)
        self._assignment = ShardAssignment.of(self._dataset.num_shards, world)
        self._rank = rank
        self._tokenizer = tokenizer
        self._length = config.sequence_length
        self._vocabulary = config.model.vocab_size
        self._position = Position(0, 0, 0)
        self._read_before: list[Layer] = []  # by runs at other numbers of ranks
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
        check_tokens(windows, self._vocabulary, f"dataset {self._name}")
        return torch.from_numpy(windows)

    def state_dict(self) -> dict[str, Any]:
        """See `TrainData`."""
        return {
            "shards": self._assignment.shards,
            "parts": self._assignment.parts,
            "position": list(self._position),
            "read before": [
                {"parts": layer.assignment.parts, "positions": [list(position) for position in layer.positions]}
                for layer in self._read_before
            ],
            "left": torch.from_numpy(self._left.astype(np.int64)),
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """See `TrainData`."""
        shards, world = self._assignment.shards, self._assignment.world
        if states[0]["shards"] != shards:
            raise ValueError(f"the dataset had {states[0]['shards']} shards and has {shards}: it is not the same one")
        before = [_layer(shards, layer["parts"], layer["positions"]) for layer in states[0]["read before"]]
        if len(states) == world:
            self._assignment = ShardAssignment(shards, world, states[0]["parts"])
            self._position = Position(*states[self._rank]["position"])
            left = [states[self._rank]["left"]]
        else:
            before.append(_layer(shards, states[0]["parts"], [state["position"] for state in states]))
            self._assignment = ShardAssignment.of(shards, world, even=True)
            first = min(position.turn for position in before[-1].positions)
            self._position = Position(first, 0, 0)
            before = [layer for layer in before if max(position.turn for position in layer.positions) >= first]
            left = [state["left"] for state in states[self._rank :: world]]
        self._read_before = before
        # The first token of each was already predicted: it is kept where a window starts with it.
        kept = [tokens for tokens in left if len(tokens)]
        parts = [tokens if i == 0 else tokens[1:] for i, tokens in enumerate(kept)]
        self._left = torch.cat(parts).numpy().astype(np.uint32) if parts else np.empty(0, dtype=np.uint32)
        self._rows = None

    def _next_text(self) -> bytes:
        lanes = self._assignment.lanes(self._rank)
        turn = self._position.turn
        while self._position.turn <= turn + 1:  # the rest of this pass over the data, then one whole pass
            turn_now, lane, document = self._position
            shard, part = lanes[lane]
            if self._rows is None:
                self._rows = iter(self._dataset.shard(self._assignment.shards, shard).skip(document))
            row = next(self._rows, None)
            if row is None:
                last = lane + 1 == len(lanes)
                self._position = Position(turn_now + 1, 0, 0) if last else Position(turn_now, lane + 1, 0)
                self._rows = None
                continue
            self._position = Position(turn_now, lane, document + 1)
            mine = document % self._assignment.parts == part
            if mine and not any(layer.has_read(turn_now, shard, document) for layer in self._read_before):
                return text_of(row, self._text_key)
        raise ValueError("this rank's part of the dataset is empty: it has fewer documents than there are ranks")


class Position(NamedTuple):
    """Where a rank stands: in which pass over the data, in which of its lanes, before which document of the shard."""

    turn: int
    lane: int
    document: int


@dataclass(frozen=True)
class ShardAssignment:
    """Who reads which documents: each of a dataset's shards is cut into parts, which are dealt to the ranks.

    Document d of a shard belongs to part ``d % parts``. A rank reads a shard whole to keep its part of it.
    """

    shards: int
    world: int
    parts: int

    @staticmethod
    def of(shards: int, world: int, even: bool = False) -> ShardAssignment:
        """As few parts as divide evenly among the ranks: one, if there are as many shards as ranks, or a multiple.

        Args:
            shards: of the dataset.
            world: number of ranks.
            even: whether what is left of each shard may differ much, so that a rank needs some of many to have its
                share of the rest, and not to begin another pass before the others.
        """
        return ShardAssignment(
            shards, world, world if even and shards < 8 * world else world // math.gcd(shards, world)
        )

    def lanes(self, rank: int) -> list[tuple[int, int]]:
        """The (shard, part) pairs that ``rank`` reads, in order."""
        return [divmod(lane, self.parts) for lane in range(rank, self.shards * self.parts, self.world)]


@dataclass(frozen=True)
class Layer:
    """What a run had read when its ranks stood at ``positions``."""

    assignment: ShardAssignment
    positions: tuple[Position, ...]

    def has_read(self, turn: int, shard: int, document: int) -> bool:
        """Whether it had read a document of a pass."""
        parts = self.assignment.parts
        lane, rank = divmod(shard * parts + document % parts, self.assignment.world)
        return Position(turn, lane, document) < self.positions[rank]


def _layer(shards: int, parts: int, positions: Sequence[Sequence[int]]) -> Layer:
    return Layer(ShardAssignment(shards, len(positions), parts), tuple(Position(*position) for position in positions))


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
