"""The files in ``ds_configs/`` are what DeepSpeed understands, completely, and what their README says.

DeepSpeed ignores unknown top-level keys, so a typing error would change a run without a word. A dictionary that notes
which of its keys are read shows whether DeepSpeed's own parser looked at each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from deepspeed.runtime.config import DeepSpeedConfig

from apollo_dist.integrations.deepspeed_config import lint

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")


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


def filled(path: Path) -> dict[str, Any]:
    """The file's content, with "auto" replaced as the Hugging Face Trainer does it for a model of hidden size 64."""
    content = load(path)
    if not path.stem.endswith("_hf"):
        return content
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = transformers.TrainingArguments(
        output_dir="unused", use_cpu=True, report_to=[], bf16=True, per_device_train_batch_size=8, max_grad_norm=0.0
    )
    trainers = HfTrainerDeepSpeedConfig(content)
    trainers.trainer_config_process(arguments)
    trainers.trainer_config_finalize(
        arguments, type("Model", (), {"config": transformers.LlamaConfig(hidden_size=64)}), 9
    )
    result: dict[str, Any] = trainers.config
    return result


def test_the_expected_files_are_there() -> None:
    names = {path.stem for path in FILES}
    stages = {f"zero{stage}{kind}" for stage in (1, 2, 3) for kind in ("", "_bf16", "_offload", "_hf")}
    assert names == stages | {"zero0", "zero0_bf16", "zero1_bf16_fp32_grads", "zero2_apollo"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lint_finds_nothing(path: Path) -> None:
    for world in (None, 1, 3, 64):
        assert lint.check(lint.load(path), world=world, hugging_face=path.stem.endswith("_hf")) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_reads_every_key(path: Path) -> None:
    assert unread_keys(filled(path)) == set()


def test_a_typing_error_would_be_noticed() -> None:
    content = load(FOLDER / "zero2.json")
    content["gradient_cliping"] = content.pop("gradient_clipping")
    assert unread_keys(content) == {"gradient_cliping"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_parsed_values_are_what_the_name_promises(path: Path) -> None:
    name, content = path.stem, filled(path)
    assert "auto" not in str(content)
    config = DeepSpeedConfig(content)
    assert config.zero_optimization_stage == int(name[len("zero")])
    assert config.bfloat16_config.enabled == any(word in name for word in ("bf16", "offload", "hf"))
    assert not config.float16_config.enabled
    assert config.grad_accum_dtype == ("fp32" if name.endswith("fp32_grads") else None)
    assert config.optimizer_name == ("APOLLO" if name.endswith(("apollo", "hf")) else None)
    assert config.gradient_clipping == 0.0
    assert config.train_micro_batch_size_per_gpu == 8
    offload = config.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == name.endswith("offload")
    assert (config.zero_config.offload_param is not None) == (name == "zero3_offload")
    assert config.zero_force_ds_cpu_optimizer != name.endswith("offload")
    assert not config.zero_allow_untested_optimizer, "APOLLO is registered"
    assert config.zero_config.gather_16bit_weights_on_model_save == name.startswith("zero3")


def test_leaving_out_clipping_means_clipping_at_one() -> None:
    """The reason why every file states it; if DeepSpeed changes its default, ds_configs/README.md must change."""
    content = load(FOLDER / "zero2.json")
    del content["gradient_clipping"]
    assert DeepSpeedConfig(content).gradient_clipping == 1.0


def test_auto_in_plain_deepspeed() -> None:
    """It fails at the top, and is the default below: ds_configs/README.md and ``lint`` say so."""
    with pytest.raises(TypeError):
        DeepSpeedConfig({"train_batch_size": "auto"})
    config = DeepSpeedConfig({"train_batch_size": 1, "bf16": {"enabled": "auto"}})
    assert not config.bfloat16_config.enabled


def test_the_readme_explains_every_file_and_key() -> None:
    for path in FILES:
        assert f"`{path.name}`" in README
        for key in flat_keys(load(path)):
            assert f"| `{key}` |" in README, f"{path.name}: {key} has no row in ds_configs/README.md"


# The table of GPUs follows from the formulas below it.

# hidden size, feed-forward size, layers, columns of keys and values
LLAMAS = {
    "1B": (2048, 5461, 24, 2048), "7B": (4096, 11008, 32, 4096), "13B": (5120, 13824, 40, 5120),
    "30B": (6656, 17920, 60, 6656), "70B": (8192, 28672, 80, 1024),
}  # fmt: skip


def sizes(hidden: int, ffn: int, layers: int, kv: int) -> tuple[int, int]:
    """Parameters, and bytes of APOLLO's state at rank 256."""
    matrices = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(ffn, hidden)] * 3
    others = 2 * 32000 * hidden + (2 * layers + 1) * hidden
    parameters = layers * sum(m * n for m, n in matrices) + others
    return parameters, 8 * (256 * layers * sum(max(shape) for shape in matrices) + others)


def best(n: int, s: int, w: int) -> str:
    """The cell: the first file whose memory stays below the limits."""
    live = 2 * min(n, load(FOLDER / "zero3_bf16.json")["zero_optimization"]["stage3_max_live_parameters"])
    files = {
        "zero2_bf16": (2 * n + (6 * n + s) / w, 4 * n / w, 0),
        "zero3_bf16": ((8 * n + s) / w + live, 4 * n / w, 0),
        "zero2_offload": (2 * n + 2 * n / w, 0, (8 * n + s) / w),
        "zero3_offload": (live, 0, (10 * n + s) / w),
    }
    for name, (resident, step, host) in files.items():
        if resident < 60e9 and resident + step < 72e9:
            return f"`{name}` ({resident / 1e9:.0f}" + (f" + {host / 1e9:.0f})" if host else ")")
    raise AssertionError("nothing fits")


def test_the_table_of_gpus_follows_from_its_formulas() -> None:
    header = re.search(r"^\| parameters \|(.*)\|$", README, re.MULTILINE)
    assert header is not None
    worlds = [int(number) for number in re.findall(r"\d+", header[1])]
    assert (worlds[0], worlds[-1]) == (1, 64)
    for model, shape in LLAMAS.items():
        row = f"| {model} | " + " | ".join(best(*sizes(*shape), world) for world in worlds) + " |"
        assert row in README, row
    n, s = sizes(*LLAMAS["7B"])
    assert f"{s / 1e9:.1f} GB at 7B, where\nAdamW's is {8 * n / 1e9:.1f} GB" in README
