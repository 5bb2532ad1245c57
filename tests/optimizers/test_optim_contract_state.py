"""The contract of ``torch.optim`` as to state, groups and keywords: copies, pickles, loads, errors."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO

from ..models import gradients, relative_error
from ..reference import Reference
from .test_optim_contract import RANKS, Network, assert_same, train

# State.


def continues(first, optimizer, second, other):
    train(first, optimizer, range(4, 9))
    train(second, other, range(4, 9))
    assert_same(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_continue_exactly(dtype, copied):
    model = Network(dtype)
    optimizer = APOLLO(model, lr=0.02, rank=3, update_proj_gap=3, seed=4)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts an unpicklable step() into the optimizer
    train(model, optimizer, range(4))
    twin, other = copied((model, optimizer))
    assert other.param_groups[0]["params"][0] is next(p for p in twin.parameters() if p.dim() == 2)
    assert "differentiable" not in other.defaults
    assert {s["exp_avg"].dtype for s in other.state.values()} == {torch.float32 if dtype == torch.bfloat16 else dtype}
    continues(model, optimizer, twin, other)
    other.add_param_group({"params": [("2.weight", nn.Parameter(torch.ones(4, 4)))], "rank": 2})


def test_copy_before_the_first_step_and_after_a_load():
    model = Network()
    fresh = copy.deepcopy((model, APOLLO(model, rank=3)))
    optimizer = APOLLO(model, rank=3)
    train(model, optimizer, range(4))
    train(*fresh, range(4))
    assert_same(model, fresh[0])
    loaded = copy.deepcopy(model)
    other = APOLLO(loaded, rank=3)
    other.load_state_dict(optimizer.state_dict())
    continues(model, optimizer, *copy.deepcopy((loaded, other)))


def test_pickle_holds_each_number_once():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(20)])
    optimizer = APOLLO(model, rank=8)
    train(model, optimizer, [0])
    numbers = sum(p.numel() * p.element_size() for p in model.parameters()) + optimizer.state_bytes()
    assert len(pickle.dumps(optimizer)) < 1.5 * numbers + 400 * 120  # and some 400 bytes for each tensor


def test_state_dict_has_torchs_form_and_is_independent_once_loaded(tmp_path):
    model, twin = Network(torch.bfloat16), Network(torch.bfloat16)
    optimizer = APOLLO(model, rank=3)
    assert optimizer.state_dict()["state"] == {}
    train(model, optimizer, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert [i for g in saved["param_groups"] for i in g["params"]] == [0, 1, 2, 3] == list(saved["state"])
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "last_norm"}
    assert set(saved["state"][2]) == {"step", "exp_avg", "exp_avg_sq"}
    assert {s[k].dtype for s in saved["state"].values() for k in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    twin.load_state_dict(model.state_dict())
    other = APOLLO(twin, lr=1.0, rank=3)
    live = optimizer.state_dict()
    other.load_state_dict(live)
    assert other.param_groups[0]["lr"] == 0.01
    before = other.state_dict()["state"][0]["exp_avg"].clone()
    live["state"][0]["exp_avg"].zero_()
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], before)
    optimizer.load_state_dict(saved)
    continues(model, optimizer, twin, other)


def test_state_shows_what_is_there():
    model = Network()
    optimizer = APOLLO(model, rank=3)
    assert not optimizer.state
    train(model, optimizer, range(2))
    assert set(optimizer.state) == set(model.parameters())
    assert optimizer.state[model[0].weight]["step"] == 2
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (12, 3)
    train(model, optimizer, [2])
    assert optimizer.state[model[0].weight]["step"] == 3


def test_loading_what_does_not_fit():
    model = Network()
    optimizer = APOLLO(model, rank=3)
    train(model, optimizer, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups with \[2, 2\] parameters, and here they have \[1, 3\]"):
        APOLLO([{"params": model[0].weight, "rank": 3},
                {"params": [model[0].bias, *model[1].parameters()]}]).load_state_dict(saved)  # fmt: skip
    bad = copy.deepcopy(saved)
    bad["param_groups"][1]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"parameter group 1 of the loaded state: lr must be >= 0, got -1\.0"):
        APOLLO(model, rank=3).load_state_dict(bad)
    for change, message in (
        (lambda s: s["state"][1].pop("exp_avg_sq"), "has step, last_norm, exp_avg, and no exp_avg_sq"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(12, 2)), "exp_avg of shape (12, 2) for 0.weight"),
        (lambda s: s["state"][3].update(exp_avg=torch.zeros(7)), "exp_avg of shape (7,) for 1.bias"),
    ):
        bad = copy.deepcopy(saved)
        change(bad)
        other = APOLLO(model, rank=3)
        with pytest.raises(ValueError, match=re.escape(message)):
            other.load_state_dict(bad)


# Groups.


def test_add_param_group_after_steps_and_after_a_load():
    def late(model):
        return {"params": [("late.weight", model.late)], "rank": 2, "lr": 0.05}

    def network():
        model = Network()
        model.late = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
        return model

    model, start = network(), network()
    groups = lambda m: [{"params": [(n, p) for n, p in m.named_parameters() if n in RANKS], "rank": 3}]  # noqa: E731
    optimizer = APOLLO(groups(model), lr=0.02)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    other = APOLLO(groups(twin), lr=0.02)
    other.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group(late(model))
    other.add_param_group(late(twin))
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same(model, twin)
    reference = Reference({"0.weight": start[0].weight, "1.weight": start[1].weight}, RANKS, lr=0.02)
    second = Reference({"late.weight": start.late}, {"late.weight": 2}, lr=0.05)
    shapes = {name: p.shape for name, p in start.named_parameters()}
    for step in range(6):
        given = gradients(shapes, step, 0)
        reference.step({name: given[name] for name in RANKS})
        if step >= 3:
            second.step({"late.weight": given["late"]})
    assert relative_error(model[1].weight.detach(), reference.weights["1.weight"]) < 1e-12
    assert relative_error(model.late.detach(), second.weights["late.weight"]) < 1e-12
    third = APOLLO(groups(copy.deepcopy(twin)), lr=0.02)
    third.add_param_group(late(twin))
    third.load_state_dict(other.state_dict())


def test_a_bad_group_leaves_the_optimizer_as_it_was():
    model = Network()
    optimizer = APOLLO(model, rank=3)
    before = len(optimizer.param_groups)
    extra = nn.Parameter(torch.ones(4, 4))
    for group, message in (
        ({"params": [model[0].weight]}, "is given twice, before as 0.weight"),
        ({"params": [extra]}, "parameter group 2: 1 of 1 parameters, the first of shape (4, 4), came without a name"),
        ({"params": [("extra", extra), ("extra", extra)]}, "is given twice, before as extra"),
        ({"params": [("extra", extra)], "rank": 9}, "rank 9 is larger than extra"),
        ({"params": [("extra", extra)], "lr": -1}, "parameter group 2: lr must be >= 0"),
        ({"params": [extra], "ranks": 1}, "parameter group 2: unknown key 'ranks'. Did you mean 'rank'?"),
        ({"params": [("extra", extra * 2)], "rank": 2}, "can't optimize a non-leaf Tensor"),
        ({"params": {extra}}, "a set has none"),
        ({"params": [extra], "amsgrad": True}, "parameter group 2: amsgrad=True is not supported"),
        ({"params": [("extra", torch.ones(2, dtype=torch.complex64))]}, "real floating-point parameters only"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == before, message
    optimizer.add_param_group(
        {"params": [("extra", extra)], "rank": 2, "foreach": None, "fused": True, "amsgrad": False}
    )
    assert not {"foreach", "fused", "amsgrad"} & set(optimizer.param_groups[-1])


def test_empty_parameters_and_missing_gradients():
    model = Network()
    model.empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))
    model.scalar = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = APOLLO(model, rank=3)
    optimizer.step()  # no gradient at all
    train(model, optimizer, range(4))
    twin = copy.deepcopy(model)
    other = APOLLO(twin, rank=3)
    other.load_state_dict(optimizer.state_dict())
    continues(model, optimizer, twin, other)
    assert optimizer.state_dict()["state"][2]["exp_avg"].numel() == 0


# Keywords.


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("correct_bias", False, "always corrects the bias"),
        ("adam_w_mode", False, "always decoupled"),
        ("capturable", True, "a CUDA graph would repeat one and the same step"),
        ("differentiable", True, "outside of autograd"),
        ("amsgrad", True, "no maximum of second moments"),
        ("maximize", 1, "maximize must be True or False, got 1"),
        ("lr", torch.tensor([0.1, 0.2]), "lr must be a number, or a tensor of one"),
        ("lr", torch.tensor(-0.1), "lr must be >= 0"),
        ("lr", torch.tensor(1), "lr must be a number, or a tensor of one floating-point number"),
        ("betas", (1.0, 0.9), "betas must be two numbers"),
        ("betas", (-0.1, 0.9), "betas must be two numbers"),
        ("eps", -1e-8, "eps must be >= 0"),
        ("weight_decay", -1, "weight_decay must be >= 0"),
    ],
)
def test_keywords_that_are_refused(keyword, value, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        APOLLO(Network(), rank=3, **{keyword: value})
    assert keyword in str(error.value)


def test_keywords_that_say_what_is_done_anyway():
    model = Network()
    neutral = {"foreach": None, "fused": None, "capturable": False, "differentiable": False, "amsgrad": False}
    optimizer = APOLLO(model, rank=3, **neutral)
    assert not set(neutral) & set(optimizer.defaults)
    # Parameter groups of torch's AdamW are taken as they are.
    groups = torch.optim.AdamW(model.parameters()).param_groups
    APOLLO([{**group, "rank": None} for group in groups], rank=3)


def test_parameters_given_twice_or_as_torch_would_not_take_them():
    one, two = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    for params in ([one, one], [{"params": one, "rank": 1}, {"params": one}], [("a", one), ("b", one)]):
        with pytest.raises(ValueError, match="is given twice"):
            APOLLO(params, rank=1)
    # One tensor is a list of one, and parameters without a name are named by position.
    for params in (one, [one, two], [{"params": [one], "rank": 1}, {"params": [two]}]):
        APOLLO(params, rank=1)
    # As in torch, all parameters have names or none has.
    for params in ([("weight", one), two], [{"params": [one], "rank": 1}, {"params": [("weight", two)]}]):
        with pytest.raises(ValueError, match=r"came without a name|of earlier groups have none"):
            APOLLO(params, rank=1)
    for params in ([], [1.0], {one}):
        with pytest.raises(ValueError, match=r"empty parameter list|must be tensors|a set has none"):
            APOLLO(params, rank=1)


def test_defaults_and_repr():
    optimizer = APOLLO(Network(), lr=0.02, rank=3)
    assert optimizer.defaults["lr"] == 0.02
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    text = repr(optimizer)
    assert text.startswith("APOLLO (")
    assert "rank: 3" in text
    assert "maximize: False" in text
    assert "tensor(" not in text
