"""PyTorch's own tests of its optimizers, asked of APOLLO on matrices, with the pieces of them that torch ships.

Torch's ``test_optim.py``, ``test_lrscheduler.py`` and ``test_swa_utils.py`` ask every optimizer for the same: these
tests ask for that in their own words, with ``OptimizerInfo`` and ``OptimizerInput`` from ``torch.testing``. Where
APOLLO means to differ, the test says how.
"""

import copy
import io
import itertools
import pickle
import re
import sys
import types
import unittest

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_pre_hook

from apollo_dist import APOLLO, APOLLOMini

try:
    import expecttest  # noqa: F401
except ImportError:  # torch.testing derives test cases from its class, of which none is used here
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_adam,
)


def inputs(device=None, dtype=None):
    """Configurations, as torch lists them for each of its optimizers."""
    return [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.02}, desc="lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.02)}, desc="tensor lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1}, desc="decay"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1, "maximize": True}, desc="maximize"),
        OptimizerInput(params=None, kwargs={"betas": (0.5, 0.9), "eps": 1e-8}, desc="betas"),
        OptimizerInput(params=None, kwargs={"update_proj_gap": 2}, desc="gap"),
        OptimizerInput(params=None, kwargs={"scale_type": "tensor", "scale": 4.0, "disable_nl": True}, desc="tensor"),
    ]


SCHEDULERS = [
    lambda opt: schedulers.StepLR(opt, gamma=0.9, step_size=10),
    lambda opt: schedulers.LinearLR(opt, start_factor=0.4, total_iters=4),
    lambda opt: schedulers.ExponentialLR(opt, gamma=0.99),
    lambda opt: schedulers.ConstantLR(opt, factor=0.4, total_iters=4),
    lambda opt: schedulers.PolynomialLR(opt, power=0.9, total_iters=40),
    lambda opt: schedulers.CosineAnnealingLR(opt, T_max=20),
    lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, T_0=5),
    lambda opt: schedulers.MultiplicativeLR(opt, lambda _: 0.98),
    lambda opt: schedulers.LambdaLR(opt, lambda step: 1 / (1 + step)),
    lambda opt: schedulers.CyclicLR(opt, 0.001, 0.02, cycle_momentum=False),
    lambda opt: schedulers.OneCycleLR(opt, 0.02, total_steps=60, cycle_momentum=True),
    lambda opt: schedulers.ReduceLROnPlateau(opt, patience=2),
    lambda opt: swa_utils.SWALR(opt, swa_lr=0.005, anneal_epochs=3),
]
INFOS = [
    OptimizerInfo(APOLLO, optim_inputs_func=inputs, scheduler_inputs=[[one] for one in SCHEDULERS]),
    OptimizerInfo(APOLLOMini, optim_inputs_func=inputs, scheduler_inputs=[[one] for one in SCHEDULERS]),
]
CASES = [
    pytest.param(info.optim_cls, given.kwargs, id=f"{info.name}-{given.desc.replace(' ', '_')}")
    for info in INFOS
    for given in info.optim_inputs_func()
]
every_input = pytest.mark.parametrize(("kind", "kwargs"), CASES)
RANK = {APOLLO: 2, APOLLOMini: 1}


def build(kind, params, kwargs, **more):
    return kind(params, **{"rank": RANK[kind], **copy.deepcopy(kwargs), **more})


def problem(seed=0):
    """A wide and a tall matrix, a bias, and the loss whose gradients they get."""
    torch.manual_seed(seed)
    weight, wide, bias = (nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 9), (6,)))
    x, y = torch.randn(9, 12), torch.randn(6, 12)

    def loss():
        return (weight @ (wide @ x) + bias[:, None] - y).square().mean()

    return [weight, wide, bias], loss


def take(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def equal_state(first, second):
    """Whether two state dicts hold the same numbers."""
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert state.keys() == second["state"][key].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(second["state"][key][k])) for k, v in state.items())
    strip = lambda groups: [sorted(g.items()) for g in groups]  # noqa: E731
    assert repr(strip(first["param_groups"])) == repr(strip(second["param_groups"]))
    return True


# Errors.


def test_what_torch_refuses_is_refused():
    """But a single parameter, which is taken as a list of one."""
    given = [
        *get_error_inputs_for_all_optims("cpu", torch.float32),
        *optim_error_inputs_func_adam("cpu", torch.float32),
    ]
    asked = 0
    for error in given:
        wanted = error.optimizer_error_input
        if error.error_on is not OptimizerErrorEnum.CONSTRUCTION_ERROR or wanted.desc == "invalid param type":
            continue
        if "with/without names" in wanted.desc or "foreach" in wanted.kwargs or "both Tensors" in wanted.desc:
            continue  # names are asked below; tensors of one number are taken in any case
        params = wanted.params or [nn.Parameter(torch.ones(2, 2))]
        with pytest.raises(ValueError):
            APOLLO(params, rank=1, **wanted.kwargs)
        asked += 1
    assert asked >= 6


# The direction.


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(kind, kwargs, contiguous):
    params, loss = problem()
    if not contiguous:
        params[0].data = torch.stack([params[0].data, params[0].data], dim=-1)[..., 0]
        assert not params[0].is_contiguous()
    optimizer = build(kind, params, kwargs)
    before = float(loss().detach())
    take(optimizer, loss, 20)
    went = float(loss().detach()) - before
    assert went > 0 if kwargs.get("maximize") else went < 0


@pytest.mark.parametrize("number", range(len(SCHEDULERS)))
def test_goes_in_the_right_direction_with_a_scheduler(number):
    params, loss = problem()
    optimizer = APOLLO([{"params": params[:2], "rank": 2, "lr": 0.01}, {"params": params[2:]}], lr=0.02)
    first = SCHEDULERS[number](optimizer)
    second = schedulers.ExponentialLR(optimizer, 0.999)
    before = float(loss().detach())
    for _ in range(30):
        take(optimizer, loss, 1)
        for scheduler in (first, second):
            scheduler.step(*([loss().detach()] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    assert float(loss().detach()) < before
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("number", range(len(SCHEDULERS)))
def test_a_scheduler_and_an_optimizer_resume_to_the_same_bits(number):
    params, loss = problem()
    twins, of_twins = problem()
    optimizers = [APOLLO(each, lr=0.01, rank=2, update_proj_gap=3) for each in (params, twins)]
    schedules = [SCHEDULERS[number](optimizer) for optimizer in optimizers]

    def go(i, steps):
        for _ in range(steps):
            take(optimizers[i], (loss, of_twins)[i], 1)
            plateau = isinstance(schedules[i], schedulers.ReduceLROnPlateau)
            schedules[i].step(*([(loss, of_twins)[i]().detach()] if plateau else []))

    go(0, 5)
    file = io.BytesIO()
    torch.save((optimizers[0].state_dict(), schedules[0].state_dict(), [p.detach() for p in params]), file)
    go(0, 5)
    file.seek(0)
    state, schedule, weights = torch.load(file, weights_only=False)
    with torch.no_grad():
        for p, w in zip(twins, weights, strict=True):
            p.copy_(w)
    schedules[1].load_state_dict(schedule)
    optimizers[1].load_state_dict(state)
    go(1, 5)
    assert same(params, twins)
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]


def test_a_chain_of_schedulers():
    params, loss = problem()
    optimizer = APOLLO(params, lr=0.02, rank=2)
    warm = schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    rest = schedulers.CosineAnnealingLR(optimizer, 10)
    chain = schedulers.SequentialLR(optimizer, [warm, rest], milestones=[3])
    seen = []
    for _ in range(6):
        take(optimizer, loss, 1)
        chain.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[2] == pytest.approx(0.02)
    assert seen[0] < seen[1] < seen[2] > seen[3] > seen[4]


# Averages of weights.


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_models(average):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    optimizer = APOLLO(model.parameters(), lr=0.01, rank=2)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.005, anneal_epochs=2)
    x, wanted = torch.randn(16, 6), []
    for step in range(5):
        take(optimizer, lambda: model(x).square().mean(), 1)
        averaged.update_parameters(model)
        schedule.step()
        now = [p.detach().clone() for p in model.parameters()]
        if not step:
            wanted = now
        elif average is None:
            wanted = [w + (p - w) / (step + 1) for w, p in zip(wanted, now, strict=True)]
        else:
            wanted = [0.9 * w + 0.1 * p for w, p in zip(wanted, now, strict=True)]
    for p, w in zip(averaged.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), w)
    swa_utils.update_bn([x], averaged)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert optimizer.param_groups[0]["swa_lr"] == 0.005
    again = APOLLO(model.parameters(), lr=0.01, rank=2)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["swa_lr"] == 0.005


# Steps that do nothing.


@every_input
def test_a_step_without_gradients_is_no_step(kind, kwargs):
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = build(kind, params, kwargs)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert same(params, before)
    assert all(int(s["step"]) == 0 for s in optimizer.state.values())


@every_input
def test_gradients_of_zero_move_nothing_but_by_decay(kind, kwargs):
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = build(kind, params, {k: v for k, v in kwargs.items() if k != "weight_decay"})
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(params, before)


def test_gradients_are_left_as_they_are():
    params, loss = problem()
    optimizer = APOLLO(params, lr=0.01, rank=2, weight_decay=0.1, maximize=True)
    loss().backward()
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert same([p.grad for p in params], before)


# Groups.


def test_decay_and_lr_of_groups():
    """A group with decay moves its weights further to zero; one with lr 0 does not move."""
    params, _ = problem()
    start = [p.detach().clone() for p in params]
    optimizer = APOLLO(
        [{"params": [params[0]], "rank": 2, "lr": 0.0}, {"params": [params[1]], "rank": 2, "weight_decay": 0.5}], lr=0.1
    )
    for p in params[:2]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(params[0], start[0])
    torch.testing.assert_close(params[1].detach(), start[1] * 0.95)


# Printing, defaults, closures.


@every_input
def test_it_prints_and_is_not_empty_after_a_step(kind, kwargs):
    params, loss = problem()
    optimizer = build(kind, params, kwargs)
    assert repr(optimizer).startswith(f"{kind.__name__} (")
    take(optimizer, loss, 1)
    assert optimizer.state
    assert all(p in optimizer.state for p in params)
    assert repr(optimizer).count("lr:") == len(optimizer.param_groups)


def test_a_closure_is_called_once_and_its_loss_returned():
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    calls = []

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        calls.append(value.item())
        return value

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    assert optimizer.step() is None


# State dicts.


@every_input
@pytest.mark.parametrize(("named", "named_too"), list(itertools.product([True, False], repeat=2)))
def test_a_state_dict_continues_to_the_same_bits(kind, kwargs, named, named_too):
    """With the same names on both sides; other names are other projections, so an error, where torch goes on."""
    with_names = lambda params, yes: [(f"layers.{i}.weight", p) for i, p in enumerate(params)] if yes else params  # noqa: E731
    params, loss = problem()
    optimizer = build(kind, with_names(params, named), kwargs, rank=1, seed=3)
    take(optimizer, loss, 5)
    state = copy.deepcopy(optimizer.state_dict())
    twins, of_twins = problem()
    with torch.no_grad():
        for p, q in zip(twins, params, strict=True):
            p.copy_(q)
    other = build(kind, with_names(twins, named_too), kwargs, rank=1, seed=3)
    if named != named_too:
        with pytest.raises(ValueError, match=r"was named .* and here it is"):
            other.load_state_dict(state)
        other.accept_at_load("names")
        other.load_state_dict(state)
        return
    other.load_state_dict(state)
    assert equal_state(other.state_dict(), state)
    take(optimizer, loss, 5)
    take(other, of_twins, 5)
    assert same(params, twins)
    assert equal_state(other.state_dict(), optimizer.state_dict())


@every_input
def test_saved_and_loaded_with_weights_only(kind, kwargs):
    params, loss = problem()
    optimizer = build(kind, params, kwargs)
    take(optimizer, loss, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert equal_state(loaded, optimizer.state_dict())
    other = build(kind, params, kwargs)
    other.load_state_dict(loaded)
    assert equal_state(other.state_dict(), loaded)


def test_step_is_a_tensor_and_may_come_as_a_number():
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    take(optimizer, loss, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        assert one["step"].dtype == torch.float32
        assert one["step"].shape == ()
        assert one["step"].device.type == "cpu"
        one["step"] = 3
    optimizer.load_state_dict(state)
    assert all(torch.is_tensor(one["step"]) for one in optimizer.state.values())
    take(optimizer, loss, 1)
    assert {float(one["step"]) for one in optimizer.state.values()} == {4.0}


def test_a_state_of_version_0_1_goes_on(caplog):
    """Without seed and version, with ``step`` as a number; the log says so once."""
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    take(optimizer, loss, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["seed"], group["state_version"]
    for one in state["state"].values():
        one["step"] = int(one["step"])
    twins, of_twins = problem()
    with torch.no_grad():
        for p, q in zip(twins, params, strict=True):
            p.copy_(q)
    other = APOLLO(twins, rank=2)
    with caplog.at_level("WARNING", "apollo_dist"):
        other.load_state_dict(state)
    assert [r.message for r in caplog.records if "version 0.1" in r.message]
    take(optimizer, loss, 3)
    take(other, of_twins, 3)
    assert same(params, twins)
    assert other.state_dict()["param_groups"][0]["state_version"] == 1


def test_copies_keep_all_public_attributes():
    params, loss = problem()
    optimizer = APOLLO(params, rank=2, seed=5, skip_nonfinite=True)
    take(optimizer, loss, 2)
    other = copy.deepcopy(optimizer)
    public = lambda o: {name for name in vars(o) if not name.startswith("_")}  # noqa: E731
    assert public(optimizer) == public(other)
    assert equal_state(other.state_dict(), optimizer.state_dict())
    assert equal_state(pickle.loads(pickle.dumps(optimizer)).state_dict(), optimizer.state_dict())
    assert equal_state(copy.deepcopy(other).state_dict(), optimizer.state_dict())


# Hooks.


def test_hooks_of_steps():
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    seen = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    after = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    everyone = register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all"))
    take(optimizer, loss, 1)
    for hook in (before, after, everyone):
        hook.remove()
    take(optimizer, loss, 1)
    assert seen == ["all", "before", "after"]


def test_hooks_of_state_dict():
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    take(optimizer, loss, 1)
    first = optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("test", 1))
    last = optimizer.register_state_dict_post_hook(lambda o, d: d.update(ran=True))
    changes = optimizer.register_state_dict_post_hook(lambda o, d: {**d, "again": True}, prepend=True)
    found = optimizer.state_dict()
    assert found["state"]["test"] == 1
    assert found["ran"]
    assert found["again"]
    for hook in (first, last, changes):
        hook.remove()
    assert "ran" not in optimizer.state_dict()


def test_hooks_of_load_state_dict():
    params, loss = problem()
    optimizer = APOLLO(params, lr=0.5, rank=2)
    take(optimizer, loss, 1)
    state = optimizer.state_dict()
    order = []

    def faster(o, given):
        order.append("faster")
        given = copy.deepcopy(given)
        given["param_groups"][0]["lr"] *= 2
        return given

    optimizer.register_load_state_dict_pre_hook(lambda o, d: order.append("second"))
    optimizer.register_load_state_dict_pre_hook(faster, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: o.state.__setitem__("test", 2))
    optimizer.load_state_dict(state)
    assert order == ["faster", "second"]
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert state["param_groups"][0]["lr"] == 0.5
    assert optimizer.state["test"] == 2
    assert optimizer.state_dict()["state"]["test"] == 2


def test_a_pre_hook_can_rename():
    """What torch's documentation proposes for parameters that have other names."""
    params, loss = problem()
    optimizer = APOLLO([(f"old.{i}", p) for i, p in enumerate(params)], rank=2)
    take(optimizer, loss, 1)
    twins, _ = problem()
    other = APOLLO([(f"new.{i}", p) for i, p in enumerate(twins)], rank=2)

    def rename(o, given):
        groups = [
            {**g, "param_names": [re.sub("old", "new", n) for n in g["param_names"]]} for g in given["param_groups"]
        ]
        return {**given, "param_groups": groups}

    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == ["new.0", "new.1", "new.2"]


def test_keys_that_are_no_parameters_are_kept():
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    take(optimizer, loss, 1)
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": {**state["state"], "mine": {"ema": 7}}})
    assert optimizer.state["mine"] == {"ema": 7}
    take(optimizer, loss, 1)
    assert optimizer.state_dict()["state"]["mine"] == {"ema": 7}
    assert copy.deepcopy(optimizer).state["mine"] == {"ema": 7}
