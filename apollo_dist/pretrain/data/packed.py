"""Tokens in memory or in a file, cut into windows without padding, dealt to the ranks in a seeded order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.unsignedinteger]


class TrainData(Protocol):
    """An endless supply of training windows for this rank, with a position that can be saved."""

    def take(self, count: int) -> Tensor:
        """The next ``count`` windows: (count, sequence_length + 1) int64 token ids, on the CPU."""

    def state_dict(self) -> dict[str, Any]:
        """The position: tensors and plain Python values."""

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go to the position that a run's ranks saved, in rank order; there may have been more or fewer ranks.

        Over all ranks the data goes on where it stopped: within a pass nothing is read twice or left out.
        """


class Windows:
    """All windows of ``length + 1`` tokens: window i predicts tokens i * length + 1 .. (i + 1) * length of its array.

    Neighbours share one token, so each token but an array's first is predicted once; a tail shorter than ``length``
    is left out. Windows never cross from one array to the next.
    """

    def __init__(self, arrays: Sequence[Tokens], length: int, what: str, vocabulary: int) -> None:
        self._arrays = arrays
        self.length = length
        self._what = what
        self._vocabulary = vocabulary
        counts = [max(0, (len(array) - 1) // length) for array in arrays]
        self._ends = np.cumsum(counts)
        if not sum(counts):
            total = sum(len(array) for array in arrays)
            raise ValueError(f"{what} has {total} tokens: not one sequence of {length} + 1; add data or shorten it")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Windows by index: (len(indices), length + 1) int64 token ids.

        Raises ValueError where one is not below ``vocabulary``.
        """
        rows = np.empty((len(indices), self.length + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            place = int(np.searchsorted(self._ends, index, side="right"))
            start = (index - (int(self._ends[place - 1]) if place else 0)) * self.length
            row[:] = self._arrays[place][start : start + self.length + 1]
        check_tokens(rows, self._vocabulary, self._what)
        return torch.from_numpy(rows)

    def digest(self) -> str:
        """A short hash of the sizes and contents; of arrays over 64 MiB it reads 1,024 evenly spaced windows."""
        total = hashlib.sha256(repr([self.length, *map(len, self._arrays)]).encode())
        if sum(array.nbytes for array in self._arrays) <= 64 << 20:
            for array in self._arrays:
                total.update(np.ascontiguousarray(array).tobytes())
        else:
            spaced = np.linspace(0, len(self) - 1, 1024).astype(int).tolist()
            total.update(self.batch(spaced).numpy().tobytes())
        return total.hexdigest()[:16]


def check_tokens(tokens: NDArray[np.int64], vocabulary: int, what: str) -> None:
    """Raise ValueError for a token that the model has no embedding for; ``what`` names the data."""
    highest = int(tokens.max(initial=0))
    if highest >= vocabulary:
        raise ValueError(f"{what} holds token {highest}, and model.vocab_size is {vocabulary}")


class PackedData:
    """Training windows in a new seeded order every epoch.

    The run's sample i, counted over all ranks and epochs, is window ``order(i // n)[i % n]`` and goes to rank
    ``i % world``: step k takes samples k * batch_size .. (k + 1) * batch_size - 1 whatever the number of ranks.
    """

    def __init__(self, windows: Windows, seed: int, rank: int, world: int) -> None:
        self._windows = windows
        self._seed = seed
        self._rank = rank
        self._world = world
        self._next = rank  # of the run's samples, the next one for this rank
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> Tensor:
        """See `TrainData`."""
        samples = [self._next + k * self._world for k in range(count)]
        self._next += count * self._world
        return self._windows.batch([self._window(sample) for sample in samples])

    def state_dict(self) -> dict[str, Any]:
        """See `TrainData`."""
        return {"samples": self._next - self._rank}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """See `TrainData`."""
        positions = {int(state["samples"]) for state in states}
        if len(positions) != 1:
            raise ValueError(f"the checkpoint's ranks stood at different samples: {sorted(positions)}")
        self._next = positions.pop() + self._rank

    def _window(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self._windows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._windows))
            self._epoch = epoch
        return int(self._order[place])
