"""AdamW, SGD, Muon against torch's, Adam-mini, GaLore, Fira against their authors' packages, in one process; errors,
and mixed rules."""

from __future__ import annotations

import copy
import importlib
import logging
import math
import sys
from types import ModuleType

import pytest
import torch

import apollo_dist
from apollo_dist import APOLLO, SCALE, AdamMini, AdamW
from apollo_dist.integrations.deepspeed_config.lint import check

from ..models import gradients, relative_error, shapes_of
from ..reference import Reference
from .problems import CASES, HEAD_DIM, HEADS, KV_HEADS, Llama
from .references import Dense, singular_directions

# float64, since torch computes the step size in the tensor's dtype.
RATE = torch.tensor(0.03, dtype=torch.float64)
TORCH = {
    "AdamW": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-6}),
    "AdamW, maximize": (AdamW, torch.optim.AdamW, {"maximize": True, "betas": (0.8, 0.9)}),
    "AdamW, lr tensor": (AdamW, torch.optim.AdamW, {"lr": RATE}),
    "SGD": (apollo_dist.SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    "SGD, momentum": (apollo_dist.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "SGD, Nesterov": (apollo_dist.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD, maximize": (apollo_dist.SGD, torch.optim.SGD, {"momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "SGD, lr tensor": (
        apollo_dist.SGD,
        torch.optim.SGD,
        {"momentum": 0.5, "lr": RATE},
    ),
}


def step_both(ours, theirs, model, twin, steps=8, least=0):
    """Steps of two optimizers with one schedule; some gradients are missing. The worst relative difference."""
    shapes = shapes_of(model)
    for step in range(steps):
        grads = gradients(shapes, step, 0)
        for i, ((name, p), q) in enumerate(zip(model.named_parameters(), twin.parameters(), strict=True)):
            p.grad = None if i % 4 == 1 and step in (2, 3) and least == 0 else grads[name].to(p)
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], torch.Tensor):
                    group["lr"] = 0.02 * math.cos(step / 9)
            optimizer.step()
    return max(
        relative_error(p.detach(), q.detach()) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("case", TORCH)
def test_torch(case):
    """float64: another order of operations, 1e-16 a step."""
    ours, theirs, options = TORCH[case]
    model = Llama().double()
    twin = copy.deepcopy(model)
    options = {"lr": 0.02, **options}
    assert step_both(ours(model, **options), theirs(twin.parameters(), **options), model, twin) < 1e-13


class Square(Llama):
    """Queries as wide as the model, which the package's blocks of keys need; without experts."""

    def __init__(self):
        super().__init__()
        del self.layers[2]
        for layer in self.layers:
            for name, rows in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
                linear = torch.nn.Linear(HEADS * HEAD_DIM, rows * HEAD_DIM)
                setattr(layer.self_attn, name, linear)


def test_adam_mini_package():
    """The authors' code, on a model that it knows the blocks of: 1e-16 a step in float64."""
    package = pytest.importorskip("adam_mini")
    model = Square().double()
    twin = copy.deepcopy(model)
    dim = HEADS * HEAD_DIM
    options = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    theirs = package.Adam_mini(
        twin.named_parameters(), **options, dim=dim, n_heads=HEADS, n_kv_heads=KV_HEADS, verbose=False
    )
    assert step_both(AdamMini(model, **options), theirs, model, twin, least=1) < 1e-13


SHAPES = {"layers.0.tall": (24, 10), "layers.0.wide": (10, 24), "layers.0.square": (12, 12), "norm.weight": (7,)}


def made_of(shapes, dtype):
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in shapes.items()}


def trained(optimizer, parameters, steps):
    """Steps with one schedule and gradients of a seed."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * math.cos(step / 9)
        optimizer.step()
    return [p.detach() for p in parameters.values()]


@pytest.mark.parametrize(
    ("package", "module", "kind", "alpha"),
    [
        ("galore_torch", "adamw", "GaLore", 0.25),
        ("fira", "fira_adamw", "Fira", 1.0),
        ("fira", "fira_adamw", "Fira", 0.25),
    ],
)
def test_low_rank_packages(package, module, kind, alpha, monkeypatch):
    """The authors' optimizers with their own groups, and with our projections: theirs are of float32, with any signs.

    float64: another order of operations, 1e-16 a step.
    """
    for name in (
        "bitsandbytes",
        "bitsandbytes.optim",
        "bitsandbytes.optim.optimizer",
    ):  # of an optimizer that is not run
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
    theirs = pytest.importorskip(f"{package}.{module}")
    projector = importlib.import_module(
        f"{package}." + {"fira": "gradient_projection"}.get(package, "galore_projector")
    )
    (made,) = [v for v in vars(projector).values() if hasattr(v, "get_orthogonal_matrix")]

    def ours(self, weights, rank, type):
        P = singular_directions(weights, rank)
        return P if type == "right" else P.T

    monkeypatch.setattr(made, "get_orthogonal_matrix", ours)
    found = []
    for which in (theirs.AdamW, getattr(apollo_dist, kind)):
        parameters = made_of(SHAPES, torch.float64)
        own = which is not theirs.AdamW
        given = [(name, p) if own else p for name, p in parameters.items()]
        scale = "scale" if own or package == "galore_torch" else "alpha"
        low = {"params": given[:3], "rank": 3, "update_proj_gap": 7, scale: alpha, "proj_type": "std"}
        options = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "no_deprecation_warning": True}
        found.append(trained(which([{"params": given[3:]}, low], **options), parameters, 25))
    assert max(map(relative_error, *found)) < 1e-12


def test_alpha_of_the_package_is_an_error():
    with pytest.raises(ValueError, match=r"unknown key 'alpha'\. Did you mean 'scale'"):
        apollo_dist.Fira([{"params": [torch.nn.Parameter(torch.ones(8, 8))], "rank": 2, "alpha": 0.25}])


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_torchs_muon(adjust):
    """With its iterations in bfloat16: weights of 1 that move by 0.02 a step, in float32."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": adjust}
    found = []
    for which in (torch.optim.Muon, apollo_dist.Muon):
        parameters = made_of(shapes, torch.float32)
        given = parameters.values() if which is torch.optim.Muon else parameters.items()
        found.append(trained(which(list(given), **options), parameters, 25))
    assert max(map(relative_error, *found)) < 1e-6


def test_heads_by_number_and_name():
    """Without a model, names and ``num_heads`` make the same blocks."""
    steps = {}
    for key in ("model", "names"):
        model = Square().double()
        if key == "model":
            optimizer = AdamMini(model, lr=0.02)
        else:
            optimizer = AdamMini(list(model.named_parameters()), lr=0.02, num_heads=HEADS)
        for step in range(3):
            for name, p in model.named_parameters():
                p.grad = gradients(shapes_of(model), step, 0)[name]
            optimizer.step()
        steps[key] = [p.detach() for p in model.parameters()]
    assert all(map(torch.equal, *steps.values()))


@pytest.mark.parametrize("named", [False, True])
def test_unknown_heads_are_an_error(named):
    model = Llama()
    optimizer = AdamMini(list(model.named_parameters()) if named else model.parameters(), lr=0.02)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"does not know how a matrix of shape .* Pass the model.*num_heads="):
        optimizer.step()


def test_scale_says_what_it_takes_parameters_for(caplog):
    with caplog.at_level(logging.INFO, "apollo_dist"):
        SCALE(Llama())
    assert "embedding: embed_tokens.weight (1); output head: lm_head.weight (1)" in caplog.text


def test_several_rules_in_one_optimizer():
    """APOLLO on blocks, SCALE on the head, torch's AdamW on the rest: one plan, and each follows its reference."""
    model = Llama().double()
    low = {n: 3 for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() > 1}
    parts = {"low": [], "head": [], "rest": []}
    for name, p in model.named_parameters():
        parts["low" if name in low else "head" if "lm_head" in name else "rest"].append((name, p))
    optimizer = APOLLO(
        [
            {"params": parts["low"], "rank": 3},
            {"params": parts["head"], "rule": "scale"},
            {"params": parts["rest"], "rule": "adamw", "betas": (0.8, 0.9)},
        ],
        lr=0.02, weight_decay=0.1, model=model, update_proj_gap=3,
    )  # fmt: skip
    assert "rank" not in optimizer.param_groups[1] and optimizer.param_groups[1]["eps"] == 1e-8
    weights = dict(model.named_parameters())
    first = Reference({n: weights[n] for n in low}, low, lr=0.02, weight_decay=0.1, update_proj_gap=3)
    others = {n: w for n, w in weights.items() if n not in low}
    forms = {n: ("rows", {"momentum": 0.9}) if "lm_head" in n else ("adamw", {}) for n in others}
    second = Dense(others, forms, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    shapes = shapes_of(model)
    for step in range(6):
        grads = gradients(shapes, step, 0)
        for name, p in weights.items():
            p.grad = grads[name]
        optimizer.step()
        first.step({n: grads[n] for n in low})
        second.step({n: grads[n] for n in others})
        if step == 2:  # a copy of the state goes on exactly
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.prepare()[0].shard_groups) == 1
    for name, p in weights.items():
        wanted = first.weights[name] if name in low else second.weights[name]
        assert relative_error(p.detach(), wanted) < 1e-12, name


BAD = [
    (lambda m: APOLLO([{"params": [m.lm_head.weight], "rule": "adagrad"}]), "unknown rule 'adagrad'. There are 'adam"),
    (lambda m: SCALE(m, momentum=1.5), r"SCALE: momentum must be in \[0, 1\), got 1.5"),
    (lambda m: SCALE(m, axis="left"), "SCALE: axis must be"),
    (lambda m: SCALE(m, rank=4), "unknown argument 'rank'"),
    (lambda m: SCALE(m, adam_lr=-1.0), "adam_lr_ratio must be > 0"),
    (lambda m: AdamMini(m, num_heads=0), "num_heads must be an integer >= 1"),
    (lambda m: AdamMini(m, exclude="x"), "is for low-rank matrices, of which AdamMini has none"),
    (lambda m: AdamW([{"params": [m.lm_head.weight], "momentums": 1, "rule": "sgd"}]), "Did you mean 'momentum'"),
    (lambda m: apollo_dist.param_groups(m, 8, rule="scale"), "rank, exclude and embeddings are for low-rank matrices"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make(Llama())


def test_what_the_state_does_not_fit_is_refused():
    model = Llama()
    makers = {"num_heads": AdamMini(model, lr=0.1), "momentum": apollo_dist.SGD(model, lr=0.1)}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for option, optimizer in makers.items():
        optimizer.step()
        optimizer.param_groups[0][option] = 1 if option == "num_heads" else 0.5
        with pytest.raises(ValueError, match=f"{option}.* and (is|are) now"):
            optimizer.step()
    scale = SCALE(model)
    scale.step()
    other = APOLLO(apollo_dist.param_groups(model, rule="scale"))
    with pytest.raises(ValueError, match="rule of parameter group 0"):
        other.load_state_dict(scale.state_dict())


def test_a_schedule_of_the_second_learning_rate():
    """SCALE's ``adam_lr`` follows the schedule of ``lr``."""
    model = Llama().double()
    case = CASES["SCALE"]
    optimizer = SCALE(model, lr=0.02, adam_lr=0.1)
    forms = {n: case.form(n, p.shape) for n, p in model.named_parameters()}
    forms = {n: (kind, {**more, "ratio": 5.0} if kind == "adam" else more) for n, (kind, more) in forms.items()}
    dense = Dense(dict(model.named_parameters()), forms, lr=0.02)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = dense.lr = 0.02 / (1 + step)
        grads = gradients(shapes_of(model), step, 0)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        optimizer.step()
        dense.step(grads)
    assert all(relative_error(p.detach(), dense.weights[n]) < 1e-12 for n, p in model.named_parameters())


def test_lint_knows_the_names():
    config = {"train_batch_size": 4, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}
    for kind in ("SCALE", "AdamMini"):
        assert not check({**config, "optimizer": {"type": kind, "params": {"lr": 1e-3}}})
        (found,) = check({**config, "optimizer": {"type": kind, "params": {"lr": 1e-3, "rank": 4}}})
        assert "unknown argument 'rank'" in found


@pytest.mark.parametrize("kind", [SCALE, AdamMini])
def test_bare_parameters_and_the_model_later(kind):
    """As the Trainer builds optimizers: two groups of bare parameters, and the model by ``attach``."""
    found = []
    for bare in (False, True):
        model = Llama().double()
        if bare:
            decays = [p for p in model.parameters() if p.dim() > 1]
            rest = [p for p in model.parameters() if p.dim() < 2]
            optimizer = kind([{"params": decays}, {"params": rest, "weight_decay": 0.0}], lr=0.02)
            optimizer.attach(model)
        else:
            optimizer = kind(model, lr=0.02)
        for step in range(3):
            for name, p in model.named_parameters():
                p.grad = gradients(shapes_of(model), step, 0)[name]
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_copies_and_pickles_keep_the_roles():
    model = Llama().double()
    optimizer = AdamMini(model, lr=0.02)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    twin, copied = copy.deepcopy((model, optimizer))
    for one, of in ((optimizer, model), (copied, twin)):
        for p in of.parameters():
            p.grad = torch.full_like(p, 0.5)
        one.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
