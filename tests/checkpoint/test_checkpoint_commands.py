"""``python -m apollo_dist verify`` and ``export``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from apollo_dist import APOLLO, checkpoint
from apollo_dist.__main__ import main
from apollo_dist.checkpoint.export import weights

from .checkpoint_kills import build, step
from .test_checkpoint_faults import flip

transformers = pytest.importorskip("transformers")


def llama(tied: bool = False, seed: int = 0):
    """A LLaMA with a few thousand parameters."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(tied: bool = False):
    """It after a step, and its optimizer."""
    model = llama(tied)
    optimizer = APOLLO(model, rank=4)
    tokens = torch.arange(24).view(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model, optimizer


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: k for k, word in enumerate(["<unk>", "</s>", "one", "two"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("tied", [False, True])
def test_export_gives_what_from_pretrained_reads(tmp_path, tied, capsys):
    model, optimizer = trained(tied)
    checkpoint.save(tmp_path / "saved", model, optimizer, tokenizer=tokenizer())
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    assert "after step 1" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.bin"))
    assert list((tmp_path / "out").glob("*.safetensors"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    assert again.config.pad_token_id == 3
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        assert torch.equal(again.state_dict()[name], value), name
    tokens = torch.arange(12)[None]
    assert torch.equal(again.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("two one x")["input_ids"] == [3, 2, 0]


def test_export_to_another_dtype(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "saved", model, optimizer)
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16()), name


def test_export_refuses(tmp_path, capsys):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "saved", model, optimizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "full")]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    plain, optimizer = build(seed=0)
    checkpoint.save(tmp_path / "plain", plain, optimizer)
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "out")]) == 1
    assert "holds no Hugging Face configuration" in capsys.readouterr().err
    flip(tmp_path / "saved" / "step_00000001" / "__0_0.distcp")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 1
    assert "__0_0.distcp is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_names_what_is_bad(tmp_path, capsys):
    model, optimizer = build(seed=0)
    for number in (1, 2):
        step(model, optimizer, number)
        checkpoint.save(tmp_path / "saved", model, optimizer)
    assert main(["verify", str(tmp_path / "saved")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["good", "good"]
    assert "step_00000002: 3 files" in lines[0]
    flip(tmp_path / "saved" / "step_00000002" / "extra.pt")
    (tmp_path / "saved" / "latest").write_text("")
    assert main(["verify", str(tmp_path / "saved")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["bad ", "bad ", "good"]
    assert "latest is empty" in lines[0]
    assert "step_00000002/extra.pt is damaged" in lines[1]
    assert main(["verify", str(tmp_path / "saved" / "step_00000001")]) == 0
    assert main(["verify", str(tmp_path / "saved" / "step_00000002")]) == 1
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert "there is no checkpoint in" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_a_command(tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "apollo_dist", "verify", str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "there is no checkpoint in" in done.stdout


def test_any_reader_of_the_format_finds_the_weights(tmp_path):
    """torch.distributed.checkpoint alone, without this package."""
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, model, optimizer)
    other = llama(seed=5)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert json.loads((path / "manifest.json").read_text())["parameters"]["model.norm.weight"]["shape"] == [16]
    assert weights(checkpoint.find(path)).keys() == model.state_dict().keys()
