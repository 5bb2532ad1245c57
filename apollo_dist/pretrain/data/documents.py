"""Files to documents, and the split of documents into training and validation."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

# Of the standard library: what is installed, or generated (tables, documentation), rather than written; and test data.
NOT_SOURCE = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "pydoc_data",
    }
)


@dataclass(frozen=True)
class Document:
    """One text: UTF-8 bytes under a name that does not depend on the machine."""

    name: str
    text: bytes


def standard_library() -> list[Document]:
    """The ``*.py`` files of this Python's own standard library, without tests and installed packages, by name."""
    root = Path(os.__file__).parent
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_SOURCE)
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    documents = [Document(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(found)]
    return [document for document in documents if is_text(document.text)]


def find_files(path: str) -> tuple[list[Path], Path]:
    """The files that ``path`` (a file, a folder or a glob) names, sorted, and the folder their names start from.

    Hidden files are left out of folders. Raises ValueError if there are none.
    """
    if os.path.isdir(path):
        root = Path(path)
        files = [file for file in root.rglob("*") if file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    else:
        files = [Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else Path(path)
    if not files:
        raise ValueError(f"data {path!r} names no file")
    return sorted(files), root


def read_documents(path: str, text_key: str) -> list[Document]:
    """The documents of text and JSONL files: a text file is one, a JSONL record one each (its ``text_key``).

    A folder's files that are not UTF-8 are left out, with a line in the log; named ones raise ValueError.
    """
    files, root = find_files(path)
    documents: list[Document] = []
    skipped = []
    for file in files:
        name = file.relative_to(root).as_posix()
        content = file.read_bytes()
        if not is_text(content):
            skipped.append(name)
        elif file.suffix == ".jsonl":
            documents += _records(name, content, text_key)
        else:
            documents.append(Document(name, content))
    if skipped and not os.path.isdir(path):
        raise ValueError(f"data {path!r}: {skipped[0]} is not UTF-8 text (token files end in .bin)")
    if skipped:
        log.warning("data %s: left out %d files that are not UTF-8 text, such as %s", path, len(skipped), skipped[0])
    if not documents:
        raise ValueError(f"data {path!r} holds no text")
    return documents


def split(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation: a document goes to validation if the hash of its name falls below ``fraction``.

    So it stays where it is when others come or go. A lone document is cut instead, its end is for validation; and
    neither side of several is left empty: the documents with the lowest and the highest hash fill it.
    """
    if len(documents) == 1:
        (whole,) = documents
        cut = len(whole.text) - int(len(whole.text) * fraction)
        while cut < len(whole.text) and (whole.text[cut] & 0xC0) == 0x80:  # not inside a UTF-8 character
            cut += 1
        return [Document(whole.name, whole.text[:cut])], [Document(whole.name, whole.text[cut:])]
    places = [_place(document.name) for document in documents]
    limit = min(max(fraction, min(places) * (1 + 1e-12)), max(places))
    train = [document for document, place in zip(documents, places, strict=True) if place >= limit]
    validation = [document for document, place in zip(documents, places, strict=True) if place < limit]
    return train, validation


def is_text(content: bytes) -> bool:
    """Whether it is UTF-8 without the byte 0, which marks the end of a document."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _place(name: str) -> float:
    """A number in [0, 1) that is a function of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _records(name: str, content: bytes, text_key: str) -> Iterator[Document]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number} is not JSON: {error}") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{name}, line {number} has no text under the key {text_key!r} (option --data.text_key)")
        yield Document(f"{name}:{number}", text.encode())
