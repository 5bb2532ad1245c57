"""The data of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apollo_dist.pretrain.data.documents import Document, find_files, read_documents, split, standard_library
from apollo_dist.pretrain.data.packed import PackedData, Tokens, TrainData, Windows
from apollo_dist.pretrain.data.streaming import StreamData, read_validation
from apollo_dist.pretrain.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config, DataConfig


@dataclass(frozen=True)
class Data:
    """Training data of this rank, validation data of all ranks, and what they are."""

    train: TrainData
    validation: Windows
    bytes_per_token: float | None  # of the validation data; None where the text is not known (.bin)
    description: str
    tokenizer: Any  # a transformers tokenizer, or None where bytes or .bin files are read
    digest: str  # equal on all ranks and after resuming, or it is other data


def build_data(config: Config, rank: int, world: int) -> Data:
    """Open the data that ``config.data`` names. Raises ValueError or OSError where it cannot be read."""
    length, vocabulary = config.sequence_length, config.model.vocab_size
    if config.data.dataset is not None:
        tokenizer = _tokenizer(config)
        tokens, ratio = read_validation(config.data, tokenizer, length, _most_sequences(config))
        windows = Windows([tokens], length, "the validation split", vocabulary)
        train = StreamData(config, tokenizer, rank, world)
        described = f"dataset {config.data.dataset}, streamed"
        return Data(train, windows, ratio, described, tokenizer.original, windows.digest())
    if config.data.path is not None and _is_binary(config.data.path):
        trains, validations = _read_binary(config.data)
        # A byte is a byte, whoever wrote the file; of other tokens the text is not known.
        known = 1.0 if config.data.token_dtype == "uint8" else None
        name, original = config.data.path, None
    else:
        tokenizer = _tokenizer(config)
        original = tokenizer.original
        first, second, name = _read_text(config.data)
        trains, validations = [_encode(first, tokenizer)], [_encode(second, tokenizer)]
        known = sum(tokenizer.measure(document.text) for document in second) / len(validations[0])
    training = Windows(trains, length, f"training data ({name})", vocabulary)
    validation = Windows(validations, length, f"validation data ({config.data.validation or name})", vocabulary)
    described = f"{name}: {sum(map(len, trains)):,} training and {sum(map(len, validations)):,} validation tokens"
    return Data(
        PackedData(training, config.seed, rank, world),
        validation,
        known,
        described,
        original,
        training.digest() + validation.digest(),
    )


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    # T5's has 100 ids above its vocabulary of 32,000 that text never gives; only ids that occur must fit (`train`).
    if config.data.tokenizer is None and config.model.vocab_size < tokenizer.size:
        raise ValueError(f"model.vocab_size is {config.model.vocab_size}: byte-level text needs {tokenizer.size}")
    return tokenizer


def _most_sequences(config: Config) -> int | None:
    limits = [config.final_eval_sequences] + ([config.eval_sequences] if config.eval_every else [])
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None


def _read_text(data: DataConfig) -> tuple[list[Document], list[Document], str]:
    if data.path is None:
        return *split(standard_library(), data.validation_fraction), "Python's standard library"
    documents = read_documents(data.path, data.text_key)
    if data.validation is not None:
        return documents, read_documents(data.validation, data.text_key), data.path
    return *split(documents, data.validation_fraction), data.path


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    dtype = np.uint8 if tokenizer.size <= 1 << 8 else np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    return np.concatenate([tokenizer.encode(document.text).astype(dtype) for document in documents])


def _is_binary(path: str) -> bool:
    files, _ = find_files(path)
    binary = [file.suffix == ".bin" for file in files]
    if any(binary) and not all(binary):
        raise ValueError(f"data {path!r} mixes .bin files with others: name one kind")
    return all(binary)


def _read_binary(data: DataConfig) -> tuple[list[Tokens], list[Tokens]]:
    """Memory maps of the .bin files; the end of each is for validation unless ``data.validation`` names others."""
    trains = [_map(str(file), data.token_dtype) for file in find_files(str(data.path))[0]]
    if data.validation is not None:
        return trains, [_map(str(file), data.token_dtype) for file in find_files(data.validation)[0]]
    cuts = [len(array) - int(len(array) * data.validation_fraction) for array in trains]
    return [a[:cut] for a, cut in zip(trains, cuts, strict=True)], [
        a[cut:] for a, cut in zip(trains, cuts, strict=True)
    ]


def _map(path: str, dtype: str) -> Tokens:
    try:
        tokens: Tokens = np.memmap(path, dtype=dtype, mode="r")
    except ValueError as error:
        raise ValueError(f"{path} is no file of {dtype} tokens (--data.token_dtype): {error}") from error
    return tokens
