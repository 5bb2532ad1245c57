"""What users and tools expect of every ``torch.optim.Optimizer``, after the list of torch's own optimizer tests."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from apollo_dist import APOLLO, APOLLOMini

from ..models import gradients, relative_error
from ..reference import Reference

RANKS = {"0.weight": 3, "1.weight": 3}


class Network(nn.Sequential):
    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        super().__init__(nn.Linear(8, 12), nn.Linear(12, 5))
        self.to(dtype)


def give(model, step, sign=1.0):
    """Set the gradients of a step; returns them."""
    given = gradients({name: p.shape for name, p in model.named_parameters()}, step, 0)
    for name, p in model.named_parameters():
        p.grad = sign * given[name].to(p.dtype)
    return given


def train(model, optimizer, steps, sign=1.0):
    for step in steps:
        give(model, step, sign)
        optimizer.step()


def assert_same(first, second):
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def by_hand(model, steps, lr_of, betas_of=lambda step: (0.9, 0.999), **options):
    """The reference with its own lr and betas at every step."""
    reference = Reference(dict(model.named_parameters()), RANKS, **options)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for step in steps:
        reference.lr, reference.betas = lr_of(step), betas_of(step)
        reference.step(gradients(shapes, step, 0))
    return reference


def assert_near(model, reference, tolerance=1e-12):
    for name, p in model.named_parameters():
        assert relative_error(p.detach(), reference.weights[name]) < tolerance, name


# Closures and hooks.


def test_closure_is_called_once_with_gradients_enabled():
    model, twin = Network(), Network()
    optimizer, other = APOLLO(model, rank=3), APOLLO(twin, rank=3)
    x, calls = torch.ones(4, 8, dtype=torch.float64), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        other.zero_grad()
        same = twin(x).square().mean()
        same.backward()
        other.step()
        assert torch.equal(loss, same)
    assert calls == [True] * 3
    assert_same(model, twin)


def test_hooks_of_steps_own_and_global():
    model, seen = Network(), []
    optimizer = APOLLOMini(model)
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre")),
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append("post")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post")),
    ]
    train(model, optimizer, [0])
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, [1])
    assert len(seen) == 4


def test_hooks_of_state_dicts_see_and_change_the_state():
    model, seen = Network(), []
    optimizer = APOLLO(model, rank=3)
    train(model, optimizer, range(2))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "size": len(s["state"])})
    saved = optimizer.state_dict()
    assert saved["size"] == 4
    assert seen == ["pre"]

    resumed = APOLLO(Network(), rank=3)

    def without_size(o, s):
        assert len(s["state"]) == s["size"]
        return {key: value for key, value in s.items() if key != "size"}

    resumed.register_load_state_dict_pre_hook(without_size)
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    resumed.load_state_dict(saved)
    assert seen == ["pre", 4]
    assert "size" in saved


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    model = Network()
    optimizer = APOLLO(model, rank=3)
    train(model, optimizer, [0])
    optimizer.zero_grad(set_to_none=to_none)
    for p in model.parameters():
        assert p.grad is None if to_none else not p.grad.any()


# Learning rates and other options that change.


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            [3],
        ),
    ],
    ids=["cosine", "one cycle", "cyclic", "sequential"],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(schedule, tensor):
    model = Network()
    start = copy.deepcopy(model)
    lr = torch.tensor(0.02, dtype=torch.float64) if tensor else 0.02
    optimizer = APOLLO(model, lr=lr, rank=3, weight_decay=0.1)
    scheduler = schedule(optimizer)
    used = []
    for step in range(8):
        group = optimizer.param_groups[0]
        used.append((float(group["lr"]), group["betas"]))
        train(model, optimizer, [step])
        scheduler.step()
    assert len(set(used)) > 4
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor
    reference = by_hand(start, range(8), lambda s: used[s][0], lambda s: used[s][1], weight_decay=0.1)
    assert_near(model, reference, 1e-10)  # the moments' betas change, which the fused kernel rounds otherwise


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("lr", [torch.tensor(0.02), torch.tensor([0.02], dtype=torch.float64)])
def test_tensor_lr_is_followed_and_never_waited_for(scale_type, lr, monkeypatch):
    model = Network()
    start = copy.deepcopy(model)
    lr = lr.clone()
    optimizer = APOLLO(model, lr=lr, rank=3, weight_decay=0.1, scale_type=scale_type)
    train(model, optimizer, range(3))
    lr.mul_(0.5)
    rates = [0.02 if lr.dtype == torch.float64 else float(torch.tensor(0.02))] * 3 + [float(lr)] * 2

    def refuse(*_):
        raise AssertionError("step() waited for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy", "nonzero", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        train(model, optimizer, range(3, 5))
    assert_near(model, by_hand(start, range(5), lambda s: rates[s], weight_decay=0.1, scale_type=scale_type))


@pytest.mark.parametrize("options", [{}, {"scale_type": "tensor"}, {"disable_nl": True, "weight_decay": 0.1}])
def test_maximize_is_the_step_of_negated_gradients(options):
    model, twin = Network(), Network()
    optimizer, other = APOLLO(model, rank=3, maximize=True, **options), APOLLO(twin, rank=3, **options)
    train(model, optimizer, range(3))
    train(twin, other, range(3), sign=-1.0)
    # Also where it changes on the way: the moments are those of the negated gradients.
    for group in optimizer.param_groups:
        group["maximize"] = False
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same(model, twin)


def test_maximize_of_one_group():
    model, twin = Network(), Network()
    groups = lambda m, **more: [  # noqa: E731
        {"params": [("0.weight", m[0].weight)], "rank": 3, **more},
        {"params": [("1.weight", m[1].weight)], "rank": 3},
    ]
    optimizer, other = APOLLO(groups(model, maximize=True)), APOLLO(groups(twin))
    for step in range(3):
        give(model, step)
        give(twin, step)
        twin[0].weight.grad.neg_()
        optimizer.step()
        other.step()
    assert_same(model, twin)


@pytest.mark.parametrize("how", ["step", "unscale"])
def test_grad_scaler_skips_what_is_not_finite(how):
    model = Network(torch.float32)
    start = copy.deepcopy(model).double()
    optimizer = APOLLO(model, lr=0.01, rank=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    scales = []
    for step in range(5):
        give(model, step, sign=scaler.get_scale())
        if step == 2:
            model[0].weight.grad[1, 1] = torch.inf
        if how == "unscale":
            scaler.unscale_(optimizer)
        before = copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if step == 2:
            after = optimizer.state_dict()["state"]
            assert all(
                torch.equal(after[i][k], v) for i, s in before["state"].items() for k, v in s.items() if k[0] == "e"
            )
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    reference = by_hand(start, [0, 1, 3, 4], lambda s: 0.01, draw_dtype=torch.float32)
    assert_near(model, reference, 1e-5)
