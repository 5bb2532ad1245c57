"""``python -m apollo_dist lint``: a broken configuration for each rule; tables that match the installed DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from apollo_dist.__main__ import main
from apollo_dist.integrations.deepspeed_config import keys as ds_keys
from apollo_dist.integrations.deepspeed_config import lint
from apollo_dist.integrations.deepspeed_config.lint import check
from apollo_dist.sharding.deepspeed import unsupported

from ..timeouts import allowed

ROOT = Path(__file__).resolve().parents[2]
GONE = object()
# The DeepSpeed of the tables, whichever is installed.
VERSION = (ROOT / "constraints.txt").read_text(encoding="utf-8").partition("\ndeepspeed==")[2].partition("\n")[0]


@pytest.fixture(autouse=True)
def as_constrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of other versions are no findings here: ``test_internals.py``."""
    for module in (lint, unsupported):
        monkeypatch.setattr(module, "installed", lambda: VERSION)


def config(**changes: Any) -> dict[str, Any]:
    """A configuration without findings, and some changes; ``GONE`` removes a key."""
    good = {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "APOLLO", "params": {"lr": 0.01, "betas": [0.9, 0.999], "rank": 64}},
        "zero_optimization": {"stage": 2},
        "_comment": "keys with an underscore are comments",
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not GONE}


def zero(**changes: Any) -> dict[str, Any]:
    return config(zero_optimization={"stage": 2, **changes})


def apollo(**params: Any) -> dict[str, Any]:
    return config(optimizer={"type": "APOLLO", "params": params})


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# What is wrong with a configuration, the configuration, and the one line that must say it.
BROKEN = {
    "typo": (
        config(gradient_cliping=0.0),
        "gradient_cliping: DeepSpeed ignores this key without a word; did you mean gradient_clipping?",
    ),
    "no such key": (config(xyzzy=1), "xyzzy: DeepSpeed ignores this key without a word; remove it"),
    "typo in a section that is read leniently": (
        config(data_types={"grad_acum_dtype": "fp32"}),
        "data_types.grad_acum_dtype: DeepSpeed ignores this key without a word; did you mean grad_acc",
    ),
    "typo in a section that is read strictly": (
        zero(reduce_bucket=1),
        "zero_optimization.reduce_bucket: DeepSpeed refuses this key; did you mean",
    ),
    "typo below it": (
        zero(offload_optimizer={"device": "none", "pin_memori": True}),
        "offload_optimizer.pin_memori: DeepSpeed refuses this key; did you mean pin_memory?",
    ),
    "old section": (config(bf16=GONE, bfloat16={"enabled": True}), "bfloat16: outdated; write bf16"),
    "old key": (
        zero(cpu_offload=False),
        "zero_optimization.cpu_offload: outdated; write zero_optimization.offload_optimizer",
    ),
    "removed key": (config(amp={"enabled": True}), "amp: outdated; write bf16, fp16 or torch_autocast"),
    "old form": (config(zero_optimization=True), 'zero_optimization: outdated form; write {"stage": ...}'),
    "auto": (config(bf16={"enabled": "auto"}), 'bf16.enabled: "auto" is for the Hugging Face Trainer'),
    "auto among the optimizer's": (apollo(lr="auto"), 'optimizer.params.lr: "auto" is for the Hugging Face Trainer'),
    "no clipping": (config(gradient_clipping=GONE), "gradient_clipping: missing, and DeepSpeed then clips at 1.0"),
    "no batch size": (
        config(train_batch_size=GONE, train_micro_batch_size_per_gpu=GONE),
        "train_micro_batch_size_per_gpu: missing",
    ),
    "no stage": (config(zero_optimization=GONE), "zero_optimization.stage: missing, and DeepSpeed then shards nothing"),
    "no type": (config(optimizer={"params": {"lr": 0.1}}), "optimizer.type: missing"),
    "batch size": (
        config(train_batch_size=47),
        "47 is not a multiple of 4 (train_micro_batch_size_per_gpu) * 3 (gradient_accumulation_steps) = 12",
    ),
    "no number": (
        config(train_micro_batch_size_per_gpu="4"),
        "train_micro_batch_size_per_gpu: must be an integer >= 1, got '4'",
    ),
    "zero": (config(gradient_accumulation_steps=0), "gradient_accumulation_steps: must be an integer >= 1, got 0"),
    "small letters": (
        config(optimizer={"type": "apollo-mini"}),
        "optimizer.type: unknown, 'apollo-mini'; did you mean 'APOLLOMini'?",
    ),
    "another optimizer": (config(optimizer={"type": "AdamW"}), "optimizer.type: 'AdamW' is another optimizer, and"),
    "DeepSpeed's own Muon": (
        config(optimizer={"type": "Muon"}),
        'the only one that outranks it. This library\'s is "ApolloDistMuon". Write that, or remove',
    ),
    "an option of Muon": (
        config(optimizer={"type": "ApolloDistMuon", "params": {"momentum": 1.5}}),
        "optimizer.params: Muon: momentum must be in [0, 1), got 1.5",
    ),
    "another of torch's": (config(optimizer={"type": "SGD"}), "optimizer.type: 'SGD' is another optimizer, and"),
    "rank": (apollo(rank=0), "optimizer.params: APOLLO: rank must be an integer >= 1, got 0"),
    "unknown parameter": (apollo(rang=4), "optimizer.params: unknown argument 'rang'. Did you mean 'rank'?"),
    "beta": (apollo(betas=[0.9, "x"]), "optimizer.params: APOLLO: betas must be two numbers in [0, 1), got (0.9, 'x')"),
    "exclude": (apollo(exclude="("), "optimizer.params: exclude='(' is not a regular expression"),
    "limit among the optimizer's": (
        apollo(max_grad_norm=1.0),
        "optimizer.params.max_grad_norm: DeepSpeed refuses it; write gradient_clipping",
    ),
    "offload of an optimizer that is passed": (
        config(optimizer=GONE, zero_optimization={"stage": 2, **OFFLOAD}),
        "zero_force_ds_cpu_optimizer: must be false with offload_optimizer",
    ),
    "parameter offload at stage 2": (
        zero(offload_param={"device": "cpu"}),
        "zero_optimization.offload_param: works at stage 3 only",
    ),
    "NVMe without a path": (
        zero(offload_optimizer={"device": "nvme"}),
        "zero_optimization.offload_optimizer.nvme_path: missing",
    ),
    "a refusal": (zero(elastic_checkpoint=True), "elastic_checkpoint"),
}


def test_a_good_configuration_has_no_findings() -> None:
    assert check(config()) == check(config(), world=4) == check(config(), world=4, hugging_face=True) == []
    assert check(config(zero_optimization={"stage": 2, **OFFLOAD})) == [], "by name offload needs no more"


@pytest.mark.parametrize("case", BROKEN)
def test_one_line_says_what_is_wrong(case: str) -> None:
    broken, expected = BROKEN[case]
    findings = check(broken)
    assert len(findings) == 1, findings
    assert expected in findings[0]
    assert "\n" not in findings[0]


def test_the_number_of_ranks() -> None:
    assert check(config(), world=4) == []
    (finding,) = check(config(), world=3)
    assert finding.startswith("train_batch_size: 48 is not 4 (train_micro_batch_size_per_gpu) * 3 (gradient_accum")
    assert finding.endswith("* 3 ranks = 36")
    (finding,) = check(config(gradient_accumulation_steps=GONE), world=5)
    assert "48 is not a multiple of 4 (train_micro_batch_size_per_gpu) * 5 ranks = 20" in finding
    (finding,) = check(config(zero_optimization={"stage": 3, "zero_hpz_partition_size": 3}), world=4)
    assert finding == "zero_optimization.zero_hpz_partition_size: 3 does not divide 4 ranks"


def test_auto_for_hugging_face() -> None:
    automatic = config(
        train_batch_size="auto",
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        optimizer={"type": "APOLLO", "params": {"lr": "auto", "rank": 64}},
    )
    assert check(automatic, world=7, hugging_face=True) == []
    assert len(check(automatic)) == 5
    automatic["optimizer"]["params"]["rank"] = "auto"
    (finding,) = check(automatic, hugging_face=True)
    assert finding.startswith('optimizer.params.rank: the Hugging Face Trainer does not fill in "auto" here')
    (finding,) = check(config(zero_optimization={"stage": 3}), hugging_face=True)
    assert finding.startswith("zero_optimization.stage3_gather_16bit_weights_on_model_save: missing")


def test_exit_codes_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, broken, twice = (tmp_path / f"{name}.json" for name in ("good", "bad", "broken", "twice"))
    good.write_text(json.dumps(config()))
    bad.write_text(json.dumps(config(xyzzy=1, gradient_clipping=GONE)))
    broken.write_text('{"a": 1,}')
    twice.write_text('{"gradient_clipping": 0.0, "gradient_clipping": 1.0}')
    assert main(["lint", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    assert main(["lint", str(good), str(bad)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [str(good), "ok"], [str(bad), "xyzzy"], [str(bad), "gradient_clipping"],
    ]  # fmt: skip
    assert main(["lint", str(good), "--world", "3"]) == 1
    for path in (broken, twice, tmp_path / "missing.json", tmp_path):
        assert main(["lint", str(path), str(bad)]) == 2
        assert f"{path}: cannot be read: " in capsys.readouterr().err
    for wrong in (["lint"], [], ["lint", str(good), "--world", "0"], ["nothing"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2


def test_the_command_needs_no_deepspeed() -> None:
    hide = "import sys; sys.modules['deepspeed'] = None; sys.argv[1:] = ['lint', 'ds_configs/zero2.json']\n"
    run = "import runpy; runpy.run_module('apollo_dist', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hide + run], cwd=ROOT, capture_output=True, text=True, timeout=allowed(120), check=False
    )
    assert (done.returncode, done.stdout) == (0, "ds_configs/zero2.json: ok\n"), done.stderr


# The tables are those of the installed versions.


def test_tables_are_deepspeeds() -> None:
    pytest.importorskip("deepspeed")
    if metadata.version("deepspeed") != VERSION:
        pytest.skip(f"the tables are those of DeepSpeed {VERSION}")
    from deepspeed.runtime import config as deepspeed_config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    from .test_ds_configs import NotingDict

    sections = {name: NotingDict({}) for name in ds_keys.LENIENT}
    sections["optimizer"]["type"] = sections["scheduler"]["type"] = "x"
    noting = NotingDict({"train_batch_size": 1, **sections})
    deepspeed_config.DeepSpeedConfig(noting)
    outdated = {name for name in ds_keys.OUTDATED if "." not in name}
    assert noting.asked - outdated == ds_keys.TOP_LEVEL
    for name, section in sections.items():
        assert section.asked - {"max_grad_norm"} == ds_keys.LENIENT[name], name
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    assert models.keys() == ds_keys.STRICT.keys()
    for name, model in models.items():
        fields = {key for key, field in model.model_fields.items()}
        fields |= {field.alias for field in model.model_fields.values() if field.alias}
        old = {key for key, field in model.model_fields.items() if (field.json_schema_extra or {}).get("deprecated")}
        assert fields - {key.rpartition(".")[2] for key in ds_keys.OUTDATED} == ds_keys.STRICT[name]
        assert {f"{name}.{key}" for key in old} <= ds_keys.OUTDATED.keys()
    removed = {*deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= ds_keys.OUTDATED.keys()
    assert not ds_keys.MESH & noting.asked
    from apollo_dist.integrations.deepspeed_config.lint import DEEPSPEED_OPTIMIZERS

    assert sorted(deepspeed_config.DEEPSPEED_OPTIMIZERS) == list(DEEPSPEED_OPTIMIZERS)


def nested(names: set[str] | frozenset[str], value: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in names:
        *sections, key = name.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return result


def test_auto_is_filled_in_where_the_table_says() -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from apollo_dist.integrations.deepspeed_config.lint import _autos

    other = {"optimizer.params.rank", "zero_optimization.sub_group_size", "steps_per_print"}
    automatic = nested(ds_keys.HUGGING_FACE_AUTO | other, "auto")
    automatic["zero_optimization"]["stage"] = 3
    filled = HfTrainerDeepSpeedConfig(automatic)
    arguments = transformers.TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, transformers.LlamaModel(transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8,
    )), 10)  # fmt: skip
    # The last one is Accelerate's: Accelerator._prepare_deepspeed writes false.
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    assert set(_autos(filled.config, "")) == other | {gather}
