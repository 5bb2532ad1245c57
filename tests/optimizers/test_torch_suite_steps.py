"""What torch's tests ask of an optimizer's steps, asked of APOLLO: directions, schedulers, averages, groups."""

import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

from apollo_dist import APOLLO

from .torch_suite import (
    SCHEDULERS,
    OptimizerErrorEnum,
    build,
    every_input,
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_adam,
    problem,
    same,
    take,
)

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
