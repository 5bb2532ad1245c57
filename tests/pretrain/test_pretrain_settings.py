"""Recipes, command line, and what a configuration refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from apollo_dist.pretrain.batching import plan_batch
from apollo_dist.pretrain.engines.deepspeed_json import reconcile
from apollo_dist.pretrain.optimizer_config import AdamWConfig, ApolloConfig, ApolloMiniConfig, JsonOptimizer
from apollo_dist.pretrain.settings import help_text, known_keys, load_settings

RECIPES = ["tiny", "60M", "130M", "350M", "1B", "7B", "13B", "70B", "13B-DDP", "7B-throughput"]


@pytest.mark.parametrize(
    "optimizer", ["apollo", "apollo-mini", "galore", "fira", "muon", "scale", "adam-mini", "sgd", "adamw"]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_with_every_optimizer(recipe: str, optimizer: str) -> None:
    config = load_settings(["--recipe", recipe, "--optimizer", optimizer]).config
    assert config.optimizer.name == optimizer
    assert plan_batch(config.batch_size, config.micro_batch_size, 2).world == 2


def test_the_papers_hyperparameters() -> None:
    config = load_settings(["--recipe", "60M"]).config
    assert (config.steps, config.warmup_steps, config.batch_size, config.sequence_length) == (10000, 1000, 512, 256)
    assert isinstance(config.optimizer, ApolloConfig)
    assert (config.optimizer.rank, config.optimizer.lr, config.optimizer.update_proj_gap) == (128, 0.01, 200)
    mini = load_settings(["--recipe", "130M", "--optimizer", "apollo-mini"]).config.optimizer
    assert type(mini) is ApolloMiniConfig
    assert mini.scale == 192


def test_command_line_wins_and_converts() -> None:
    settings = load_settings(
        "--lr 3e-3 --optimizer.betas 0.8,0.95 --model.hidden_size=64 --steps 1e2 --micro_batch_size null --resume "
        "--data.validation_fraction 0.1 --local_rank=1 --local_rank 1 --local-rank=1".split()
    )
    config = settings.config
    assert isinstance(config.optimizer, ApolloConfig)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.rank) == (0.003, (0.8, 0.95), 32)
    assert (config.model.hidden_size, config.steps, config.resume) == (64, 100, True)
    assert config.micro_batch_size is None
    assert "optimizer.lr" in settings.explicit
    assert "seed" not in settings.explicit


def test_another_optimizer_takes_its_own_section() -> None:
    config = load_settings(["--optimizer", "adamw", "--optimizer.weight_decay", "0.1"]).config
    assert config.optimizer == AdamWConfig(lr=0.001, weight_decay=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stps 3", r"unknown option --stps; did you mean --steps\?"),
        ("--model.hiden_size 3", r"unknown option --model.hiden_size; did you mean --model.hidden_size\?"),
        ("--optimizer addamw", r"unknown optimizer 'addamw'; did you mean adamw\?"),
        ("--optimizer adamw --optimizer.rank 4", "optimizer adamw has no option 'rank'.*its options are lr"),
        ("--optimizer apollo-mini --optimizer.rank 4", "optimizer apollo-mini has no option 'rank'"),
        ("--recipe 60m", r"unknown recipe '60m'; did you mean 60M\?"),
        ("--recipe missing.yaml", "'missing.yaml' does not exist"),
        ("--steps", "option --steps needs a value"),
        ("--steps 3 --steps 4", "option --steps is given twice"),
        ("--steps 3.5", "steps is '3.5': it must be of type int"),
        ("--lr fast", "optimizer.lr is 'fast': it must be of type float"),
        ("--resume maybe", "resume is 'maybe': it must be of type bool"),
        ("--optimizer.betas 0.9", "optimizer.betas is '0.9': it must be 2 numbers"),
        ("train", "unexpected argument 'train'"),
        ("--steps 0", "steps is 0: it must be at least 1"),
        ("--warmup_steps 600", r"warmup_steps is 600: it must be in \[0, steps\)"),
        ("--model.num_heads 3", "model.hidden_size is 128"),
        ("--model.num_kv_heads 3", "model.num_kv_heads is 3: it must be a divisor of num_heads 4"),
        ("--precision fp8", "precision is 'fp8': it must be one of fp32, bf16, bf16-pure"),
        ("--engine fsdp", "engine is 'fsdp': it must be one of deepspeed, fsdp1, fsdp2, ddp"),
        ("--engine deepspeed", "--engine deepspeed needs --deepspeed_config"),
        ("--engine ddp --deepspeed_config x.json", "no other engine takes one"),
        ("--data x --dataset y", "both given: choose one"),
        ("--dataset y", "needs --tokenizer"),
        ("--lr -1", "lr is -1.0: it must be at least 0"),
        ("--optimizer.scale_type row", "scale_type is 'row'"),
        ("--data.token_dtype int8", "data.token_dtype is 'int8'"),
    ],
)
def test_errors_name_the_key_and_the_value(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(arguments.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stpes: 3", r"unknown key 'stpes' in recipe .*; did you mean steps\?"),
        ("optimizers: {adam: {lr: 1}}", r"unknown key 'optimizers.adam' in .*did you mean optimizers.adamw\?"),
        ("model: {hidden: 3}", r"unknown key 'model.hidden'; did you mean model.hidden_size\?"),
        ("sequence_length: 4", "the recipe lacks .*vocab_size"),
        ("model: {", "recipe .* is not YAML"),
        ("3", "recipe .* is 3: it must map names to values"),
        ("model: 3", "model in recipe .* is 3: it must map names to values"),
        ("1: 2", "it must map names to values"),
        ("optimizers: {apollo: fast}", "optimizers.apollo in recipe .* is 'fast': it must map"),
    ],
)
def test_errors_in_a_recipe_file(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(line)
    with pytest.raises(ValueError, match=message):
        load_settings(["--recipe", str(tmp_path / "mine.yaml")])


def test_files_on_the_command_line_replace_the_recipes_dataset() -> None:
    config = load_settings(["--recipe", "60M", "--data", "x.txt"]).config
    assert (config.data.path, config.data.dataset, config.data.tokenizer) == ("x.txt", None, "t5-base")


def test_a_dataset_on_the_command_line_leaves_the_recipes_configuration_behind() -> None:
    own = load_settings(["--recipe", "60M", "--dataset", "some/texts"]).config.data
    assert (own.dataset, own.dataset_config, own.tokenizer) == ("some/texts", None, "t5-base")
    same = load_settings(["--recipe", "60M", "--dataset", "allenai/c4"]).config.data
    assert (same.dataset, same.dataset_config) == ("allenai/c4", "en")


def test_help_lists_every_key() -> None:
    text = help_text()
    for key, _ in known_keys():
        assert f"--{key}" in text


def test_resumed_runs_may_differ_only_in_where_and_how_often_they_write() -> None:
    base = load_settings([]).config.computed()
    assert load_settings("--output x --checkpoint_every 3 --stop_after 4 --resume".split()).config.computed() == base
    for change in ("--steps 601", "--lr 0.02", "--seed 1", "--model.num_layers 2", "--data x", "--engine fsdp2"):
        assert load_settings(change.split()).config.computed() != base


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"), [(16, None, 2, (8, 1)), (16, 2, 2, (2, 4)), (12, 4, 3, (4, 1))]
)
def test_batch_plan(batch: int, micro: int | None, world: int, expected: tuple[int, int]) -> None:
    plan = plan_batch(batch, micro, world)
    assert (plan.micro, plan.accumulation) == expected
    assert plan.micro * plan.accumulation * world == batch


@pytest.mark.parametrize(
    ("batch", "micro", "world", "numbers"),
    [(16, None, 3, "16 does not divide by 3"), (16, 3, 2, "16 .* 3 x 2 ranks = 6"), (4, 8, 1, "4 .* 8 x 1 ranks = 8")],
)
def test_uneven_batches_are_errors(batch: int, micro: int | None, world: int, numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers):
        plan_batch(batch, micro, world)


def _reconcile(tmp_path: Path, values: object, *arguments: str, world: int = 2):  # type: ignore[no-untyped-def]
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return reconcile(load_settings(["--deepspeed_config", str(path), *arguments]), world)


def test_a_deepspeed_config_implies_its_engine_and_wins_over_the_recipe(tmp_path: Path) -> None:
    values = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    config, json_ = _reconcile(tmp_path, values)
    assert (config.engine, config.micro_batch_size, config.gradient_clipping) == ("deepspeed", 2, 0.5)
    assert config.precision == "bf16"
    assert any("precision is bf16" in note for note in json_.notes)
    passed = json_.complete(config, plan_batch(16, config.micro_batch_size, 2))
    assert (passed["train_batch_size"], passed["gradient_accumulation_steps"]) == (16, 4)


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("micro_in_json", "arguments", "world", "expected", "note"),
    [
        (8, [], 2, (8, 1), None),  # the quickstart
        (8, [], 1, (8, 2), None),
        (8, [], 4, (4, 1), "batch_size / ranks = 4, below .*'s 8"),
        (None, [], 2, (8, 1), None),
        ("auto", [], 4, (4, 1), None),
        (8, ["--micro_batch_size", "2"], 2, (2, 4), "2 from the command line, not .*'s 8"),
        (8, ["--micro_batch_size", "8"], 2, (8, 1), None),
        (4, ["--micro_batch_size", "null"], 2, (8, 1), "batch_size / ranks from the command line, not .*'s 4"),
        ("auto", ["--micro_batch_size", "2"], 2, (2, 4), None),
        (None, ["--micro_batch_size", "2"], 2, (2, 4), None),
        (8, ["--recipe", "13B"], 2, (1, 256), "1 from the recipe, not .*'s 8"),
        ("auto", ["--recipe", "13B"], 2, (1, 256), None),
        (8, ["--recipe", "60M"], 2, (8, 32), None),
    ],
)
def test_whose_micro_batch_counts(
    tmp_path: Path, micro_in_json: object, arguments: list[str], world: int, expected: tuple[int, int], note: str | None
) -> None:
    values = {} if micro_in_json is None else {"train_micro_batch_size_per_gpu": micro_in_json}
    config, json_ = _reconcile(tmp_path, values, *arguments, world=world)
    passed = json_.complete(config, plan_batch(config.batch_size, config.micro_batch_size, world))
    assert tuple(passed[key] for key in BATCH_KEYS) == (config.batch_size, *expected)
    notes = [line for line in json_.notes if line.startswith("micro_batch_size is ")]
    assert len(notes) == (note is not None)
    if note is not None:
        assert re.search(note, notes[0])


def test_auto_stands_for_the_runs_own_values(tmp_path: Path) -> None:
    values: dict[str, object] = {
        **dict.fromkeys([*BATCH_KEYS, "gradient_clipping"], "auto"),
        "fp16": {"enabled": "auto"},
    }
    given = ["--gradient_clipping", "0.5", "--precision", "bf16"]
    config, json_ = _reconcile(tmp_path, {**values, "bf16": {"enabled": "auto", "check_grad_overflow": True}}, *given)
    assert (config.precision, config.gradient_clipping) == ("bf16", 0.5)
    assert json_.complete(config, plan_batch(16, None, 2)) == {
        **dict(zip(BATCH_KEYS, (16, 8, 1), strict=True)),
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
    }
    assert json_.notes == ()
    assert _reconcile(tmp_path, {"bf16": {"enabled": "auto"}})[0].precision == "fp32"


def test_clipping_is_off_unless_somebody_asks(tmp_path: Path) -> None:
    config, json_ = _reconcile(tmp_path, {})
    assert json_.complete(config, plan_batch(16, None, 1))["gradient_clipping"] == 0.0


def test_the_jsons_optimizer_is_taken_whole(tmp_path: Path) -> None:
    config, json_ = _reconcile(tmp_path, {"optimizer": {"type": "APOLLO", "params": {"lr": 0.02}}})
    assert config.optimizer == JsonOptimizer("APOLLO", {"lr": 0.02})
    assert config.optimizer.name == "apollo"
    assert config.computed()["optimizer.params"] == {"lr": 0.02}
    assert "optimizer" in json_.values


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"gradient_clipping": 1.0}, ["--gradient_clipping", "0.5"], "--gradient_clipping 0.5 contradicts"),
        ({}, ["--precision", "bf16"], "--precision bf16 contradicts .* fp32"),
        ({"optimizer": {"type": "APOLLO"}}, ["--optimizer", "adamw"], "both .* name an optimizer"),
        ({"optimizer": {"type": "APOLLO"}}, ["--lr", "0.1"], r"--optimizer.lr\) name an optimizer"),
        ({"optimizer": {}}, [], 'must have a "type"'),
        ({"scheduler": {"type": "WarmupLR"}}, [], '"scheduler" block.*remove the block'),
        ({"fp16": {"enabled": True}}, [], "fp16"),
        ({"bfloat16": {"enabled": True}}, [], "old name.*rename"),
        ({"train_batch_size": 8}, [], "train_batch_size 8 .* batch_size 16.*--batch_size 8"),
        ({"zero_optimization": {"stage": "auto"}}, [], 'zero_optimization.stage is "auto".*remove the key'),
        ({"optimizer": {"type": "APOLLO", "params": {"lr": "auto"}}}, [], 'optimizer.params.lr is "auto"'),
        ({"optimizer": {"type": "APOLLO", "params": 3}}, [], "params is 3: it must be an object"),
        ({"optimizer": "APOLLO"}, [], "optimizer is 'APOLLO': it must be an object"),
        ({"bf16": True}, [], "bf16 is True: it must be an object"),
        ({"gradient_clipping": "on"}, [], "gradient_clipping is 'on': it must be of type float"),
        ({"train_micro_batch_size_per_gpu": 2.5}, [], "train_micro_batch_size_per_gpu is 2.5: it must be of type int"),
        ({"train_micro_batch_size_per_gpu": 0}, [], "micro_batch_size is 0: it must be at least 1"),
        ("{", [], "is not JSON"),
        ("[]", [], "no JSON object"),
    ],
)
def test_contradictions_are_errors(tmp_path: Path, values: object, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _reconcile(tmp_path, values, *arguments)
