"""Loaders, the split, packing, and which rank reads what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.data import build_data
from apollo_dist.pretrain.data.documents import Document, read_documents, split, standard_library
from apollo_dist.pretrain.data.packed import PackedData, Windows
from apollo_dist.pretrain.data.tokenizer import ByteTokenizer
from apollo_dist.pretrain.settings import load_settings

from ..pretrain_runs import write_text


def config(*arguments: str) -> Config:
    return load_settings(["--sequence_length", "16", *arguments]).config


def windows(tokens: int = 1000, length: int = 16) -> Windows:
    return Windows([np.arange(tokens, dtype=np.uint32)], length, "test data", 1000)


def test_windows_predict_every_token_once_without_padding() -> None:
    cut = windows(100, 16)
    assert len(cut) == 6  # 99 targets: 6 x 16 and a tail of 3
    batch = cut.batch(range(6))
    assert batch.shape == (6, 17)
    assert batch.dtype == torch.int64
    assert batch[:, 1:].flatten().tolist() == list(range(1, 97))


def test_windows_do_not_cross_files() -> None:
    cut = Windows([np.arange(40, dtype=np.uint16), np.arange(100, 140, dtype=np.uint16)], 16, "test data", 1000)
    starts = cut.batch(range(len(cut)))[:, 0].tolist()
    assert starts == [0, 16, 100, 116]


def test_too_little_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="test data has 16 tokens: not one sequence of 16"):
        windows(16, 16)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_step_takes_the_same_sequences_at_any_number_of_ranks(world: int) -> None:
    batch, steps = 12, 10  # 120 samples of 62 windows: the second epoch starts inside a step
    whole = PackedData(windows(), seed=5, rank=0, world=1)
    parts = [PackedData(windows(), seed=5, rank=rank, world=world) for rank in range(world)]
    for _ in range(steps):
        expected = whole.take(batch)
        dealt = [part.take(batch // world) for part in parts]
        for rank in range(world):
            assert torch.equal(dealt[rank], expected[rank::world])


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    data = PackedData(windows(), seed=0, rank=0, world=1)
    first, second = data.take(62)[:, 0].tolist(), data.take(62)[:, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 992, 16))
    assert first != second
    assert first != PackedData(windows(), seed=1, rank=0, world=1).take(62)[:, 0].tolist()


def test_the_position_resumes_at_any_number_of_ranks() -> None:
    straight = PackedData(windows(), seed=0, rank=0, world=1)
    states, first = [PackedData(windows(), seed=0, rank=0, world=1).state_dict()], 0
    for world, each in ((2, 3), (3, 8), (1, 30), (4, 3)):  # 72 samples of 62 windows
        ranks = [PackedData(windows(), seed=0, rank=rank, world=world) for rank in range(world)]
        for data in ranks:
            data.load_state_dicts(states)
        expected = straight.take(world * each)
        taken = [data.take(each) for data in ranks]
        for rank in range(world):
            assert torch.equal(taken[rank], expected[rank::world])
        states, first = [data.state_dict() for data in ranks], first + world * each
    assert first == 72
    with pytest.raises(ValueError, match="stood at different samples"):
        ranks[0].load_state_dicts([*states, {"samples": 7}])


def test_bytes_end_with_zero_and_count_it() -> None:
    assert ByteTokenizer().encode("é".encode()).tolist() == [0xC3, 0xA9, 0]
    assert ByteTokenizer().measure("é".encode()) == 3


def test_split_depends_on_the_name_alone() -> None:
    documents = [Document(f"file_{k}", b"x") for k in range(400)]
    train, validation = split(documents, 0.1)
    assert {d.name for d in train}.isdisjoint(d.name for d in validation)
    assert len(train) + len(validation) == 400
    assert 20 <= len(validation) <= 60
    fewer, fewer_validation = split(documents[::2], 0.1)
    assert {d.name for d in fewer} <= {d.name for d in train}
    assert {d.name for d in fewer_validation} <= {d.name for d in validation}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_split_leaves_neither_side_empty(fraction: float) -> None:
    train, validation = split([Document(f"file_{k}", b"x") for k in range(3)], fraction)
    assert min(len(train), len(validation)) == 1
    assert len(train) + len(validation) == 3


def test_a_lone_document_is_cut_at_a_character() -> None:
    text = "é" * 50
    (train,), (validation,) = split([Document("one", text.encode())], 0.11)
    assert train.text.decode() + validation.text.decode() == text
    assert len(validation.text) == 10


def test_standard_library_is_text_without_tests_or_packages() -> None:
    documents = standard_library()
    assert sum(len(document.text) for document in documents) > 2_000_000
    for document in documents:
        assert not {"site-packages", "test", "tests"} & set(document.name.split("/"))
    assert {"dataclasses.py", "json/decoder.py"} <= {document.name for document in documents}


def test_default_data_has_bits_per_byte() -> None:
    data = build_data(config(), 0, 2)
    assert data.bytes_per_token == 1.0
    assert "standard library" in data.description
    assert data.train.take(3).shape == (3, 17)
    assert build_data(config(), 1, 2).digest == data.digest


def test_text_files_are_split_by_file(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(chr(ord("0") + number) * 64)
    data = build_data(config("--data", str(tmp_path)), 0, 1)
    seen = data.train.take(400)
    held_out = set(data.validation.batch(range(len(data.validation))).flatten().tolist()) - {0}
    assert held_out
    assert held_out.isdisjoint(set(seen.flatten().tolist()))


def test_folders_leave_out_what_is_not_text_and_named_files_refuse_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / ".hidden").write_text("no")
    assert [document.name for document in read_documents(str(tmp_path), "text")] == ["a.txt"]
    assert "b.png" in caplog.text
    with pytest.raises(ValueError, match=r"b.png is not UTF-8"):
        read_documents(str(tmp_path / "*.png"), "text")


def test_jsonl_records_are_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"record {k}", "body": "b"}) for k in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n\n")
    documents = read_documents(str(tmp_path / "x.jsonl"), "text")
    assert [d.text for d in documents] == [b"record 0", b"record 1", b"record 2"]
    assert [d.name for d in documents] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert read_documents(str(tmp_path / "x.jsonl"), "body")[0].text == b"b"
    with pytest.raises(ValueError, match=r"x.jsonl, line 1 has no text under the key 'words'"):
        read_documents(str(tmp_path / "x.jsonl"), "words")
    (tmp_path / "x.jsonl").write_text(lines[0] + "\n{")
    with pytest.raises(ValueError, match=r"x.jsonl, line 2 is not JSON"):
        read_documents(str(tmp_path / "x.jsonl"), "text")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_token_files_are_mapped(tmp_path: Path, dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 4001).astype(dtype)
    tokens.tofile(tmp_path / "x.bin")
    data = build_data(config("--data", str(tmp_path / "x.bin"), "--data.token_dtype", dtype), 0, 1)
    assert data.bytes_per_token == (1.0 if dtype == "uint8" else None)
    held_out = data.validation.batch(range(len(data.validation)))
    assert torch.equal(held_out[0], torch.from_numpy(tokens[3801:3818].astype(np.int64)))
    rows = {tuple(row) for row in data.train.take(237).tolist()}
    assert rows == {tuple(tokens[k * 16 : k * 16 + 17].tolist()) for k in range(237)}


def test_data_that_is_not_there_or_mixed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no file"):
        build_data(config("--data", str(tmp_path / "nothing*")), 0, 1)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"mixes \.bin files"):
        build_data(config("--data", str(tmp_path)), 0, 1)
    with pytest.raises(ValueError, match=r"b.bin is no file of uint16 tokens"):
        build_data(config("--data", str(tmp_path / "b.bin")), 0, 1)


def test_validation_data_of_its_own(tmp_path: Path) -> None:
    train = write_text(tmp_path / "train")
    (tmp_path / "held.txt").write_text("ZZZZ" * 20)
    data = build_data(config("--data", str(train), "--data.validation", str(tmp_path / "held.txt")), 0, 1)
    assert set(data.validation.batch([0, 1]).flatten().tolist()) == {ord("Z")}


def test_a_changed_file_changes_the_digest(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "x")
    before = build_data(config("--data", str(folder)), 0, 1).digest
    assert build_data(config("--data", str(folder)), 0, 1).digest == before
    path = folder / "text_0.txt"
    path.write_text(path.read_text().replace("the", "teh", 1))
    assert build_data(config("--data", str(folder)), 0, 1).digest != before


def test_a_token_without_an_embedding_is_an_error(tmp_path: Path) -> None:
    tokens = np.zeros(1000, dtype=np.uint16)
    tokens[[100, 990]] = 256  # one in the training part, one in the validation part
    tokens.tofile(tmp_path / "x.bin")
    data = build_data(config("--data", str(tmp_path / "x.bin")), 0, 1)
    with pytest.raises(ValueError, match=r"training data \(.*x.bin\) holds token 256, and model.vocab_size is 256"):
        data.train.take(59)
    with pytest.raises(ValueError, match=r"validation data .* holds token 256"):
        data.validation.batch(range(len(data.validation)))


def test_bytes_need_a_vocabulary_of_256() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is 128: byte-level text needs 256"):
        build_data(config("--model.vocab_size", "128"), 0, 1)
