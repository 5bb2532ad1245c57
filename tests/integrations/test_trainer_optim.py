"""``TrainingArguments(optim="apollo_adamw")``: which matrices, which options, what is refused; in one process.

That training equals one process with whole matrices is in ``test_hugging_face_fsdp.py`` and ``test_by_name.py``.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

import apollo_dist
from apollo_dist.integrations import trainer_optim
from apollo_dist.integrations.trainer_optim import parse_optim_args, target_names

from ..llama import GAP, RANK, RATE, dense, llama, low_rank_names
from ..models import relative_error
from ..versions import needs_apollo_names
from .blocks import dataset, watched

pytestmark = needs_apollo_names

ARGS = f"rank={RANK}, update_proj_gap={GAP}"
BLOCKS = ["self_attn", "mlp"]


def arguments(**settings: Any) -> TrainingArguments:
    given = {
        "output_dir": tempfile.mkdtemp(), "optim": "apollo_adamw", "optim_args": ARGS, "optim_target_modules": BLOCKS,
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": RATE, "adam_beta2": 0.99,
        "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**{**given, **settings})


def optimizer(model: nn.Module | None = None, **settings: Any) -> apollo_dist.APOLLO:
    """The optimizer that a Trainer makes."""
    made = Trainer(model=model or llama(), args=arguments(**settings), train_dataset=dataset()).create_optimizer()
    assert isinstance(made, apollo_dist.APOLLO)
    return made


def targeted(made: apollo_dist.APOLLO) -> set[str]:
    return {made._parts.members.name(p) for g in made.param_groups if g["rank"] is not None for p in g["params"]}


@pytest.mark.parametrize("optim", ["apollo_adamw", "apollo_adamw_layerwise"])
def test_a_run_equals_the_dense_reference(optim: str) -> None:
    """fp32 weights, to 1e-5 relative."""
    model = llama()
    with watched(model) as watch:
        running = Trainer(model=model, args=arguments(optim=optim, weight_decay=0.1), train_dataset=dataset())
        running.model_accepts_loss_kwargs = False  # transformers 4 divides the sum of losses by unshifted labels
        running.train()
    assert len(set(watch.rates)) > 1
    expected = dense(watch.batches, watch.rates, betas=(0.9, 0.99), decay=lambda name: 0.0 if "norm" in name else 0.1)
    for name, p in model.named_parameters():
        assert relative_error(p.detach(), expected[name]) < 1e-5, name
    assert getattr(watch.optimizer, "updates_in_backward", False) == optim.endswith("layerwise")


def test_every_key_of_optim_args_arrives() -> None:
    text = (
        "rank=2, proj=random, scale=128.0, scale_type=tensor, update_proj_gap=50, proj_type=std, scale_front=true, "
        "disable_nl=True, seed=7, cache_projection=auto, skip_nonfinite=1, max_skipped_steps=3, refresh=spread, "
        "projection_dtype=bfloat16"
    )
    made = optimizer(optim_args=text)
    low = made.param_groups[-1]
    expected = {
        "rank": 2, "proj": "random", "scale": 128.0, "scale_type": "tensor", "update_proj_gap": 50, "proj_type": "std",
        "refresh": "spread", "projection_dtype": "bfloat16",
        "scale_front": True, "disable_nl": True, "lr": RATE, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0,
    }  # fmt: skip
    assert {key: low[key] for key in expected} == expected
    assert made.seed == 7
    assert made.cache_projection == "auto"
    rest = made.param_groups[0]
    assert rest["rank"] is None
    assert {key: rest[key] for key in ("lr", "betas", "eps")} == {"lr": RATE, "betas": (0.9, 0.99), "eps": 1e-6}


def test_defaults_are_those_of_hugging_face() -> None:
    wide = nn.Sequential(nn.Linear(256, 192))
    made = optimizer(wide, optim_args=None, optim_target_modules="all-linear")
    low = made.param_groups[-1]
    expected = {"rank": 128, "scale": 1.0, "scale_type": "channel", "update_proj_gap": 200, "proj": "random"}
    assert {key: low[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk=4", r"unknown key of optim_args 'rnk'. Did you mean 'rank'\?"),
        ("rank", "'rank' is not key=value"),
        ("rank=four", "optim_args: rank must be an integer, got 'four'"),
        ("rank=1.5", "optim_args: rank must be an integer, got '1.5'"),
        ("scale=big", "optim_args: scale must be a number, got 'big'"),
        ("disable_nl=maybe", "optim_args: disable_nl must be true or false, got 'maybe'"),
        ("rank=4,proj=qr", 'proj must be "random"'),
        ("rank=4,proj_type=reverse_std", 'proj_type must be "std"'),
        ("rank=4,scale_type=row", "scale_type must be"),
        ("rank=0", "rank must be an integer >= 1"),
        ("rank=17", "matches no trained nn.Linear weight of LlamaForCausalLM that rank 17 fits"),
    ],
)
def test_bad_optim_args_are_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(optim_args=text)


def test_a_mapping_is_as_good_as_a_string() -> None:
    assert parse_optim_args({"rank": 4, "scale": "2", "disable_nl": False}) == {
        "rank": 4, "scale": 2.0, "disable_nl": False,
    }  # fmt: skip
    assert parse_optim_args(None) == parse_optim_args("") == {}


MLP = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(2) for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (BLOCKS, set(low_rank_names(dict(llama().named_parameters())))),
        (["mlp"], MLP),
        (["model.layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj.weight"}),
        ([r"model\.layers\.1\.mlp\.(up|down)_proj"], {f"model.layers.1.mlp.{p}_proj.weight" for p in ("up", "down")}),
        (r".*mlp.*", MLP),
        (r".*\.0\.mlp\.up_proj", {"model.layers.0.mlp.up_proj.weight"}),
        ("all-linear", set(low_rank_names(dict(llama().named_parameters()))) | {"lm_head.weight"}),
        ("all_linear", set(low_rank_names(dict(llama().named_parameters()))) | {"lm_head.weight"}),
        (["lm_head", "*"], {"lm_head.weight"}),
    ],
)
def test_target_modules_as_hugging_face_defines_them(targets: Any, expected: set[str]) -> None:
    assert targeted(optimizer(optim_target_modules=targets)) == expected
    assert target_names(nn.parallel.DataParallel(llama()), targets, "apollo_adamw", RANK) == expected


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, ValueError, "needs optim_target_modules"),
        (7, TypeError, "must be a list of strings, a regular expression, or"),
        ([7], TypeError, "must be a list of strings"),
        ("(", ValueError, "is no regular expression"),
        (["nothing"], ValueError, "matches no trained nn.Linear weight"),
        (["norm"], ValueError, "matches no trained nn.Linear weight"),
    ],
)
def test_targets_that_make_no_sense_are_errors(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizer(optim_target_modules=targets)


def test_what_matches_and_takes_adamw_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(8, 12), "router": nn.Linear(8, 2)})})
    model["mlp"]["table"] = nn.Embedding(5, 8)
    with caplog.at_level(logging.WARNING, "apollo_dist"):
        made = optimizer(model, optim_target_modules=["mlp"])
    assert targeted(made) == {"mlp.up.weight"}
    (line,) = [
        record.getMessage() for record in caplog.records if "optim_target_modules matches" in record.getMessage()
    ]
    assert "matches 2 parameters that take AdamW all the same" in line
    assert "mlp.router.weight: (2, 8) is smaller than rank 4" in line
    assert "mlp.table.weight: Embedding is no nn.Linear" in line


def test_frozen_and_tied_parameters() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    made = optimizer(model, optim_target_modules="all-linear")
    assert targeted(made) == {n for n in low_rank_names(dict(llama().named_parameters())) if "layers.1" in n}
    held = {made._parts.members.name(p) for group in made.param_groups for p in group["params"]}
    assert not any("layers.0" in name for name in held)


def test_layerwise_refuses_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="with gradient_accumulation_steps=2"):
        optimizer(optim="apollo_adamw_layerwise", gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING, "apollo_dist"):
        optimizer(optim="apollo_adamw_layerwise", max_grad_norm=1.0)
    assert "max_grad_norm=1.0 has no effect" in caplog.text


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apollo-torch in its place that cannot do anything."""
    module = ModuleType("apollo_torch")
    module.__spec__ = importlib.util.spec_from_loader("apollo_torch", None)
    monkeypatch.setitem(sys.modules, "apollo_torch", module)


def test_an_installed_apollo_torch_is_left_alone_until_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch)
    with caplog.at_level(logging.WARNING, "apollo_dist"), pytest.raises(ImportError):
        optimizer()
    assert "apollo_dist.hugging_face.replace_apollo_torch() makes it mean apollo_dist" in caplog.text
    monkeypatch.setattr(trainer_optim, "_replaced", False)
    apollo_dist.hugging_face.replace_apollo_torch()
    assert targeted(optimizer()) == set(low_rank_names(dict(llama().named_parameters())))


def test_other_optimizers_are_left_alone() -> None:
    made = Trainer(model=llama(), args=arguments(optim="adamw_torch", optim_args=None)).create_optimizer()
    assert isinstance(made, torch.optim.AdamW)


def test_the_static_method_may_be_called_directly() -> None:
    """As Trainers of other packages do; without the Trainer itself."""
    model = llama()
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments(weight_decay=0.1), model)
    assert kind is apollo_dist.APOLLO
    made = kind(keywords.pop("params"), **keywords)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0, 0.1]
    with pytest.raises(ValueError, match="needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments())
