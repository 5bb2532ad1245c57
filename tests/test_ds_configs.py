"""The files in ``ds_configs/`` are what DeepSpeed understands, completely, and what their README says.

DeepSpeed ignores unknown top-level keys, so a typing error would change a run without a word. A dictionary that notes
which of its keys are read shows whether DeepSpeed's own parser looked at each of them.
"""

from __future__ import annotations

import json
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from deepspeed.runtime.config import DeepSpeedConfig

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))


class NotingDict(dict[str, Any]):
    """A dictionary that notes every key asked for, in a set shared with its copies (DeepSpeed parses a copy)."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:
        return KeysView(self)  # its `in` comes back to __contains__

    def __copy__(self) -> NotingDict:
        other = NotingDict(dict(self))
        other.asked = self.asked
        return other


def load(path: Path) -> dict[str, Any]:
    """The file's content, read by the strict JSON parser (DeepSpeed's own would accept comments too)."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def unread_keys(content: dict[str, Any]) -> set[str]:
    """Top-level keys that DeepSpeed's parser never asks for."""
    noting = NotingDict(content)
    DeepSpeedConfig(noting)
    return set(content) - noting.asked


def flat_keys(content: dict[str, Any], prefix: str = "") -> set[str]:
    """All keys with dots between levels; the optimizer's own parameters count as one key."""
    keys: set[str] = set()
    for key, value in content.items():
        name = prefix + key
        if isinstance(value, dict) and name != "optimizer.params":
            keys |= flat_keys(value, name + ".")
        else:
            keys.add(name)
    return keys


def test_the_expected_files_are_there() -> None:
    names = {path.stem for path in FILES}
    assert names == {
        *("zero0", "zero1", "zero2", "zero0_bf16", "zero1_bf16", "zero2_bf16"),
        *("zero1_bf16_fp32_grads", "zero2_apollo"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_reads_every_key(path: Path) -> None:
    content = load(path)
    assert unread_keys(content) == set()


def test_a_typing_error_would_be_noticed() -> None:
    content = load(FOLDER / "zero2.json")
    content["gradient_cliping"] = content.pop("gradient_clipping")
    assert unread_keys(content) == {"gradient_cliping"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_parsed_values_are_what_the_name_promises(path: Path) -> None:
    config = DeepSpeedConfig(load(path))
    assert config.zero_optimization_stage == int(path.stem[len("zero")])
    assert config.bfloat16_config.enabled == ("bf16" in path.stem)
    assert not config.float16_config.enabled
    assert config.grad_accum_dtype == ("fp32" if path.stem.endswith("fp32_grads") else None)
    assert config.optimizer_name == ("APOLLO" if path.stem.endswith("apollo") else None)
    assert config.gradient_clipping == 0.0
    assert config.train_micro_batch_size_per_gpu == 8


def test_leaving_out_clipping_means_clipping_at_one() -> None:
    """The reason why every file states it; if DeepSpeed changes its default, ds_configs/README.md must change."""
    content = load(FOLDER / "zero2.json")
    del content["gradient_clipping"]
    assert DeepSpeedConfig(content).gradient_clipping == 1.0


def test_the_readme_explains_every_file_and_key() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        assert f"`{path.name}`" in text
        for key in flat_keys(load(path)):
            assert f"| `{key}` |" in text, f"{path.name}: {key} has no row in ds_configs/README.md"
