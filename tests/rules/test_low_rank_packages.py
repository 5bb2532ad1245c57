"""GaLore and Fira against their authors' packages, Muon against torch's, in one process, in float64.

The packages take their singular vectors from an SVD in float32, with whatever signs it has. Here they get those of the
reference, which are ours but for rounding: what is compared is everything else.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types

import pytest
import torch

import apollo_dist

from ..models import gradients, relative_error, shapes_of
from .problems import Llama
from .references import singular_directions
from .test_packages import step_both

RANK, GAP = 3, 3


def orthogonal_matrix(self, weights, rank, type):
    """The projector's: (r, n) for "right", (m, r) for "left"."""
    P = singular_directions(weights.detach(), rank)
    assert (type == "right") == (weights.shape[0] >= weights.shape[1])
    return P if type == "right" else P.T


def models():
    """Twins without experts, which the packages do not take."""
    model = Llama().double()
    del model.layers[2]
    return model, copy.deepcopy(model)


def groups(model, **options):
    low = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() > 1]
    kept = {id(p) for p in low}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": low, "rank": RANK, "update_proj_gap": GAP, "proj_type": "std", **options}, {"params": rest}]


def without_bitsandbytes(monkeypatch):
    """galore_torch imports it for an optimizer in 8 bits, which is not compared here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
            module = types.ModuleType(name)
            module.Optimizer2State = torch.optim.Optimizer
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.filterwarnings("ignore")
def test_galore(monkeypatch):
    without_bitsandbytes(monkeypatch)
    package = pytest.importorskip("galore_torch")
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    monkeypatch.setattr(projector, "get_orthogonal_matrix", orthogonal_matrix)
    model, twin = models()
    options = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    theirs = package.GaLoreAdamW(groups(twin, scale=0.25), **options, no_deprecation_warning=True)
    ours = apollo_dist.GaLore(model, **options, rank=RANK, update_proj_gap=GAP)
    assert step_both(ours, theirs, model, twin, steps=25, least=1) < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_fira(monkeypatch, alpha):
    package = pytest.importorskip("fira")
    projector = pytest.importorskip("fira.gradient_projection").GradientProjector
    monkeypatch.setattr(projector, "get_orthogonal_matrix", orthogonal_matrix)
    model, twin = models()
    options = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    theirs = package.FiraAdamW(groups(twin, alpha=alpha), **options, no_deprecation_warning=True)
    ours = apollo_dist.Fira(model, **options, rank=RANK, update_proj_gap=GAP, scale=alpha)
    assert step_both(ours, theirs, model, twin, steps=25, least=1) < 1e-9


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False, "momentum": 0.9}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}],
    ids=["defaults", "no Nesterov", "AdamW's rates"],
)
def test_muon(options):
    """torch computes in bf16 what we do, bit for bit; the weights around it are float64."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model, twin = models()
    hidden = [name for name in shapes_of(model) if name.startswith("layers.") and name.endswith("proj.weight")]
    assert len(hidden) == 12
    for one in (model, twin):
        for name, p in one.named_parameters():
            p.requires_grad_(name in hidden)
    ours = apollo_dist.Muon(model, lr=0.02, **options)
    theirs = torch.optim.Muon([p for p in twin.parameters() if p.requires_grad], lr=0.02, **options)
    shapes = shapes_of(model)
    for step in range(10):
        grads = gradients(shapes, step, 0)
        for name, p in model.named_parameters():
            p.grad = grads.get(name)
            twin.get_parameter(name).grad = grads.get(name)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) < 1e-12
