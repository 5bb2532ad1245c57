"""Bytes, or a Hugging Face tokenizer: text to token ids."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """Turns one document into ids, its end marked by one more token."""

    @property
    def size(self) -> int:
        """Ids are below this."""

    @property
    def original(self) -> Any:
        """The ``transformers`` tokenizer behind it, or None."""

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        """Ids of one UTF-8 document and its end marker, shape (tokens,)."""

    def measure(self, text: bytes) -> int:
        """How many bytes a document counts for in bits per byte."""


class ByteTokenizer:
    """UTF-8 bytes are the tokens; a document ends with byte 0, which counts as one of its bytes."""

    size = 256
    original = None

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        """See `Tokenizer`."""
        return np.frombuffer(text + b"\0", dtype=np.uint8).astype(np.uint32)

    def measure(self, text: bytes) -> int:
        """See `Tokenizer`."""
        return len(text) + 1


class HubTokenizer:
    """A ``transformers`` tokenizer by name or folder; a document ends with its end-of-sequence token.

    Raises ValueError if the tokenizer has none.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer  # slow to import, and bytes need none

        self.original: Any = AutoTokenizer.from_pretrained(name)
        end = self.original.eos_token_id
        if not isinstance(end, int):
            raise ValueError(f"tokenizer {name!r} has no end-of-sequence token to put between documents")
        self._end = end
        self.size = len(self.original)

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        """See `Tokenizer`."""
        ids = self.original.encode(text.decode("utf-8"), add_special_tokens=False)
        return np.asarray([*ids, self._end], dtype=np.uint32)

    def measure(self, text: bytes) -> int:
        """See `Tokenizer`."""
        return len(text)


def load_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer ``name``, or bytes if it is None."""
    return ByteTokenizer() if name is None else HubTokenizer(name)
