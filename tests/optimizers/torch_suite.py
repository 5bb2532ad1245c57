"""PyTorch's own tests of its optimizers, asked of APOLLO on matrices, with the pieces of them that torch ships.

Torch's ``test_optim.py``, ``test_lrscheduler.py`` and ``test_swa_utils.py`` ask every optimizer for the same: these
tests ask for that in their own words, with ``OptimizerInfo`` and ``OptimizerInput`` from ``torch.testing``. Where
APOLLO means to differ, the test says how.
"""

import copy
import sys
import types
import unittest

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

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

__all__ = ["OptimizerErrorEnum", "get_error_inputs_for_all_optims", "optim_error_inputs_func_adam"]  # passed on


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
