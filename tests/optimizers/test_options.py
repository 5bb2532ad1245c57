"""Options of parameter groups: numbers of any library, keys of other tools, and changes between steps."""

import json
import logging
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, APOLLOMini, checkpoint
from apollo_dist.optimizers.options import misspelling_of
from apollo_dist.rules.groups import options_of
from apollo_dist.rules.registry import rules_named

from ..models import gradients, relative_error
from ..reference import Reference

RANKS = {"0.weight": 3, "1.weight": 3}


class Network(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 12), nn.Linear(12, 5))
        self.double()


def give(model, step):
    given = gradients({name: p.shape for name, p in model.named_parameters()}, step, 0)
    for name, p in model.named_parameters():
        p.grad = given[name]
    return given


NUMBERS = {
    "lr": (np.float32(1e-2), np.float64(1e-2), np.array(0.01), torch.tensor(0.01)),
    "betas": ((np.float32(0.9), 0.99), [0.9, np.float64(0.99)], (torch.tensor(0.9), torch.tensor(0.99))),
    "eps": (np.float64(1e-6), torch.tensor(1e-6)),
    "weight_decay": (np.float16(0.5), np.int64(1)),
    "rank": (np.int64(2), np.uint8(2), torch.tensor(2)),
    "scale": (np.float32(2.0), np.int32(2)),
    "update_proj_gap": (np.int32(3),),
    "disable_nl": (np.bool_(True),),
    "maximize": (np.bool_(False),),
    "seed": (np.int64(3),),
    "max_skipped_steps": (np.int64(3),),
    "cache_projection": (np.bool_(True),),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_numbers_of_other_libraries_are_taken_and_kept_as_pythons_own(key, value, tmp_path):
    model = Network()
    optimizer = APOLLO(model, **{"rank": 3, "skip_nonfinite": key == "max_skipped_steps", key: value})
    give(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
    again = APOLLO(Network(), rank=3, **({"seed": 3} if key == "seed" else {}))
    if key != "rank":
        again.load_state_dict(state)
    kept = optimizer.param_groups[0].get(key)
    numbers = kept if isinstance(kept, tuple) else [kept]
    assert all(type(number) in (int, float, bool, type(None)) for number in numbers) or key == "lr"


def test_a_schedule_that_returns_numpy_scalars_trains_saves_and_loads(tmp_path):
    model, twin = Network(), Network()
    optimizer = APOLLO(model, rank=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.float32(0.5) ** t)
    reference = Reference(dict(twin.named_parameters()), RANKS)
    for step in range(4):
        reference.lr = float(optimizer.param_groups[0]["lr"])
        assert abs(reference.lr - 1e-2 * 0.5**step) < 1e-8
        reference.step(give(model, step))
        optimizer.step()
        schedule.step()
        optimizer.param_groups[1]["betas"] = (np.float64(0.9), np.float64(0.999))
        optimizer.param_groups[0]["lr_scale"] = np.float32(1.0)
    for name, p in model.named_parameters():
        assert relative_error(p.detach(), reference.weights[name]) < 1e-12
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    APOLLO(Network(), rank=3).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    folder = checkpoint.save(tmp_path, model, optimizer, step=np.int64(4), keep=np.int64(1))
    assert json.loads((folder / "manifest.json").read_text())["step"] == 4
    model, other = Network(), None
    other = APOLLO(model, rank=3)
    checkpoint.load(tmp_path, model, other)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_keys_of_other_tools_pass_and_misspelled_options_do_not(caplog):
    weight = nn.Parameter(torch.ones(4, 4))
    others = {
        "lr_scale": 0.5,
        "group_name": "a",
        "lr_mult": 2.0,
        "layer_id": 3,
        "is_bias": False,
        "weight_decay_mult": 1,
    }
    with caplog.at_level(logging.INFO, "apollo_dist"):
        optimizer = APOLLO([{"params": [weight], "rank": 2, **others}])
    assert others.items() <= optimizer.param_groups[0].items()
    assert "keeps 'lr_scale', 'group_name'" in caplog.text
    copy = APOLLO([{"params": [weight], "rank": 2}])
    copy.load_state_dict(optimizer.state_dict())
    assert others.items() <= copy.param_groups[0].items()
    for wrong, right in {
        "ranks": "rank", "weight-decay": "weight_decay", "weightDecay": "weight_decay", "scale_typ": "scale_type",
        "update_proj_gab": "update_proj_gap", "beta": "betas", "learning_rate": "lr", "LR": "lr", "lrs": "lr",
        "maximise": "maximize",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"parameter group 0: unknown key '{wrong}'. Did you mean '{right}'"):
            APOLLO([{"params": [weight], "rank": 2, wrong: 1}])


def test_a_hint_never_changes_the_update():
    for key in (
        "lr_scale",
        "scale_lr",
        "max_lr",
        "min_rank",
        "momentum",
        "rank_scale",
        "layer_decay",
        "project",
        "norm",
    ):
        assert misspelling_of(key, options_of(rules_named("apollo"))) is None
        with pytest.raises(ValueError, match=f"unknown argument '{key}'. Supported") as error:
            APOLLO(Network(), rank=3, **{key: 1.0})
        assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "accepted",
    [
        {"foreach": False}, {"foreach": True}, {"fused": False}, {"correct_bias": True}, {"bias_correction": True},
        {"no_deprecation_warning": True}, {"no_deprecation_warning": False}, {"adam_w_mode": True},
    ],
)  # fmt: skip
def test_keywords_that_ask_for_what_is_done_anyway(accepted):
    model, twin = Network(), Network()
    in_group = [{"params": [(name, p)], "rank": RANKS.get(name), **accepted} for name, p in twin.named_parameters()]
    for given, optimizer in ((model, APOLLO(model, rank=3, **accepted)), (twin, APOLLO(in_group))):
        assert not set(accepted) & set(optimizer.param_groups[0])
        give(given, 0)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


# Changes between steps.


CHANGES = {
    "scale_type": "tensor", "update_proj_gap": 1, "scale": 4.0, "disable_nl": True, "maximize": True, "eps": 1e-3,
    "betas": (0.5, 0.9), "weight_decay": 0.3, "lr": 0.5, "scale_front": True,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_an_option_changed_between_steps_acts_from_the_next_step_on_and_can_be_put_back(key):
    model = Network()
    reference = Reference(dict(model.named_parameters()), RANKS, update_proj_gap=2)
    optimizer = APOLLO(model, rank=3, update_proj_gap=2)
    names = {"update_proj_gap": "gap"}
    before = {"maximize": False, "scale_front": False, **optimizer.param_groups[0]}[key]
    for step in range(9):
        if step in (3, 6):
            value = CHANGES[key] if step == 3 else before
            for group in optimizer.param_groups:
                group[key] = value
            setattr(reference, names.get(key, key), value)
        given = give(model, step)
        sign = -1 if key == "maximize" and 3 <= step < 6 else 1
        reference.step({name: sign * grad for name, grad in given.items()})
        optimizer.step()
        for name, p in model.named_parameters():
            assert relative_error(p.detach(), reference.weights[name]) < 1e-9, (step, name)


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        (0, "rank", 2, "parameter group 0: rank was 3 and is now 2, but the moments of its matrices are of rank 3"),
        (0, "rank", None, "parameter group 0: rank was 3 and is now None, but .* low-rank"),
        (1, "rank", 1, "parameter group 1: rank was None and is now 1, but .* AdamW's"),
        (0, "proj", "qr", 'parameter group 0: proj must be "random"'),
        (0, "proj_type", "left", 'parameter group 0: proj_type must be "std"'),
        (0, "proj", "svd", "parameter group 0: proj was 'random' and is now another, but moments"),
        (0, "proj_type", "rademacher", "parameter group 0: proj_type was 'std' and is now another, but moments"),
        (0, "scale_type", "row", "parameter group 0: scale_type must be"),
        (0, "update_proj_gap", 0, "parameter group 0: update_proj_gap must be an integer >= 1, got 0"),
        (0, "update_proj_gap", 2.5, "parameter group 0: update_proj_gap must be"),
        (1, "betas", (0.9, 1.0), "parameter group 1: betas must be two numbers"),
        (1, "eps", -1, "parameter group 1: eps must be >= 0"),
        (0, "maximize", "no", "parameter group 0: maximize must be True or False"),
        (1, "lr", "1e-3", "parameter group 1: lr must be a number"),
    ],
)
def test_a_change_that_means_nothing_is_an_error_that_names_option_and_group(group, key, value, message):
    model, twin = Network(), Network()
    optimizer, undisturbed = APOLLO(model, rank=3), APOLLO(twin, rank=3)
    for step in range(4):
        give(model, step)
        give(twin, step)
        if step == 2:
            before, optimizer.param_groups[group][key] = optimizer.param_groups[group][key], value
            with pytest.raises(ValueError, match=message):
                optimizer.step()
            optimizer.param_groups[group][key] = before
        optimizer.step()
        undisturbed.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_before_the_first_step_a_rank_may_change():
    model, twin = Network(), Network()
    optimizer, other = APOLLO(model, rank=3), APOLLO(twin, rank=2)
    optimizer.param_groups[0]["rank"] = np.int64(2)
    for given, one in ((model, optimizer), (twin, other)):
        give(given, 0)
        one.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_option_that_was_deleted():
    model = Network()
    optimizer = APOLLOMini(model)
    give(model, 0)
    optimizer.step()
    del optimizer.param_groups[0]["scale"]
    with pytest.raises(ValueError, match=re.escape("parameter group 0: it has no scale any more")):
        optimizer.step()


def test_looking_at_the_options_costs_little():
    optimizer = APOLLO(Network(), rank=3)
    check = optimizer._parts.changes.check
    check(optimizer.param_groups, optimizer._parts.store.has_state)
    start = time.perf_counter()
    for _ in range(1000):
        check(optimizer.param_groups, optimizer._parts.store.has_state)
    assert (time.perf_counter() - start) / 1000 < 100e-6
