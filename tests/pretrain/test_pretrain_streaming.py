"""Hugging Face datasets and tokenizers, from local files: what a hub would serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.data import Data, build_data
from apollo_dist.pretrain.settings import load_settings

datasets = pytest.importorskip("datasets")
WORDS = ["<unk>", "</s>"] + [f"w{k}" for k in range(200)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_dataset(folder: Path, kind: str, documents: int = 60) -> Path:
    folder.mkdir()
    for split, start in (("train", 0), ("validation", 150)):
        texts = [" ".join(f"w{start + (k + j) % 50}" for j in range(5 + k % 7)) for k in range(documents)]
        if kind == "parquet":
            datasets.Dataset.from_dict({"text": texts}).to_parquet(str(folder / f"{split}.parquet"))
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{split}.jsonl").write_text(lines)
    return folder


def settings(dataset: Path, tokenizer: Path, *more: str) -> Config:
    base = ["--dataset", str(dataset), "--tokenizer", str(tokenizer), "--sequence_length", "8"]
    return load_settings([*base, *more]).config


def documents_of(data: Data, count: int) -> list[tuple[int, ...]]:
    """The documents in the next ``count`` windows, from one end marker to the next."""
    stream = torch.cat([data.train.take(1)[0, :-1] for _ in range(count)]).tolist()
    found: list[tuple[int, ...]] = []
    rest: list[int] = []
    for token in stream:
        rest.append(token)
        if token == 1:
            found.append(tuple(rest))
            rest = []
    return found


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ranks_read_disjoint_documents_packed_without_padding(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    config = settings(write_dataset(tmp_path / "data", kind), tokenizer)
    whole = documents_of(build_data(config, 0, 1), 60)
    parts = [documents_of(build_data(config, rank, 2), 26) for rank in range(2)]
    assert len(parts[0]) > 15
    assert not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) <= set(whole)


def test_a_stream_resumes_where_it_stopped(tmp_path: Path, tokenizer: Path) -> None:
    config = settings(write_dataset(tmp_path / "data", "jsonl"), tokenizer)
    data = build_data(config, 1, 2)
    for _ in range(7):
        data.train.take(3)
    torch.save(data.train.state_dict(), tmp_path / "position.pt")
    expected = [data.train.take(3) for _ in range(20)]  # over the end: the second pass too
    again = build_data(config, 1, 2)
    state = torch.load(tmp_path / "position.pt", weights_only=True)
    again.train.load_state_dicts([build_data(config, 0, 2).train.state_dict(), state])
    for batch in expected:
        assert torch.equal(again.train.take(3), batch)


@pytest.mark.parametrize("files", [1, 3, 4])
def test_a_stream_resumes_at_another_number_of_ranks(tmp_path: Path, tokenizer: Path, files: int) -> None:
    """Within a pass every document is read once, whoever reads it; document d is its own word, 3 to 9 times."""
    (tmp_path / "data").mkdir()
    for file in range(files):
        texts = [" ".join([f"w{d}"] * (3 + d % 7)) for d in range(150) if d % files == file]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "data" / f"train-{file}.jsonl").write_text(lines)
    (tmp_path / "data" / "validation.jsonl").write_text(json.dumps({"text": "w150 " * 30}) + "\n")
    config = settings(tmp_path / "data", tokenizer)
    seen = torch.zeros(len(WORDS), dtype=torch.int64)
    wanted = torch.tensor([0, 150] + [3 + d % 7 for d in range(150)] + [0] * (len(WORDS) - 152))
    states: list[dict[str, object]] = []
    started = 0  # streams whose first token nothing predicts
    for world, windows in ((2, 5), (3, 7), (1, 11), (4, 5), (3, 9)):
        ranks = [build_data(config, rank, world).train for rank in range(world)]
        for data in ranks:
            if states:
                data.load_state_dicts(states)
        started += sum(len(data.state_dict()["left"]) == 0 for data in ranks)
        for number in range(windows):
            for rank, data in enumerate(ranks):
                # Ranks need not be equally far, or in the same pass.
                count = 2 if rank == 0 and number == 0 else 1
                seen += torch.bincount(data.take(count)[:, 1:].flatten(), minlength=len(WORDS))
        states = [torch.load(_saved(data.state_dict(), tmp_path), weights_only=True) for data in ranks]
        assert bool((seen <= wanted).all()), (world, seen - wanted)
    last = build_data(config, 0, 1).train
    last.load_state_dicts(states)
    while seen.sum() + 8 <= wanted.sum() - started:
        seen += torch.bincount(last.take(1)[:, 1:].flatten(), minlength=len(WORDS))
    assert bool((seen <= wanted).all()), seen - wanted
    assert int((wanted - seen).sum()) < 8 + started
    while int(seen[2:152].min()) < 6:  # two more passes, and all documents are in them
        seen += torch.bincount(last.take(1)[:, 1:].flatten(), minlength=len(WORDS))


def _saved(state: dict[str, object], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_another_dataset_is_an_error(tmp_path: Path, tokenizer: Path) -> None:
    data = build_data(settings(write_dataset(tmp_path / "data", "jsonl"), tokenizer), 0, 1)
    with pytest.raises(ValueError, match="had 7 shards and has 1"):
        data.train.load_state_dicts([{**data.train.state_dict(), "shards": 7}])


def test_a_dataset_with_fewer_documents_than_ranks_is_an_error(tmp_path: Path, tokenizer: Path) -> None:
    data = build_data(settings(write_dataset(tmp_path / "data", "jsonl", documents=2), tokenizer), 2, 3)
    with pytest.raises(ValueError, match="fewer documents than there are ranks"):
        data.train.take(1)


def test_validation_is_the_same_on_every_rank_and_knows_its_bytes(tmp_path: Path, tokenizer: Path) -> None:
    dataset = write_dataset(tmp_path / "data", "jsonl")
    config = settings(dataset, tokenizer, "--final_eval_sequences", "9", "--eval_sequences", "4")
    first, second = (build_data(config, rank, 2) for rank in range(2))
    assert len(first.validation) == 9
    assert torch.equal(first.validation.batch(range(9)), second.validation.batch(range(9)))
    assert int(first.validation.batch(range(9)).max()) > 150
    everything = build_data(settings(dataset, tokenizer), 0, 1)
    texts = [json.loads(line)["text"] for line in (dataset / "validation.jsonl").read_text().splitlines()]
    tokens = sum(len(text.split()) + 1 for text in texts)
    assert everything.bytes_per_token == sum(map(len, texts)) / tokens
    assert len(everything.validation) == (tokens - 1) // 8


def test_a_missing_text_key_names_the_keys_there_are(tmp_path: Path, tokenizer: Path) -> None:
    config = settings(write_dataset(tmp_path / "data", "jsonl"), tokenizer, "--data.text_key", "body")
    with pytest.raises(ValueError, match="under the key 'body', only text"):
        build_data(config, 0, 1)


def test_files_with_a_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "x.txt").write_text("w3 w4 w5 " * 100)
    arguments = ["--data", str(tmp_path / "x.txt"), "--tokenizer", str(tokenizer), "--sequence_length", "6"]
    data = build_data(load_settings(arguments).config, 0, 1)
    assert set(data.train.take(20).flatten().tolist()) <= {1, 5, 6, 7}
    assert data.bytes_per_token is not None
    assert 2.5 < data.bytes_per_token < 3.1
