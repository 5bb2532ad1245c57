"""Rules: their maths on tensors without ranks, and a rule of a test's own, exact under every engine.

The own rule shares nothing with APOLLO: its channels are columns or rows, it has no projection, it keeps a number for
each channel and one for each matrix, and decays the weight first. The package is not touched for it.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import apollo_dist
from apollo_dist import checkpoint
from apollo_dist.kernels import reference
from apollo_dist.kernels.parts import AdamWPart
from apollo_dist.optimizers.base import ShardedOptimizer
from apollo_dist.rules import adamw, apollo, builtin, scale, sgd
from apollo_dist.rules.base import MatrixRule, Reduce, Reply, Rules, Seen, Spec, State, Update
from apollo_dist.rules.roles import HEAD, Role
from apollo_dist.step import own

from ..engines import full_weights, initialize, prepare, zero_config
from ..models import Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..ranks import run_ranks
from ..sharded import fsdp1, fsdp2, whole

OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


@pytest.mark.parametrize("name", [name for name in vars(builtin) if name.isupper()])
@pytest.mark.parametrize("step", [1, 2, 500])
def test_the_form_of_adam_is_the_update(name, step):
    """What a kernel computes by ``adam``, with an epsilon that shows where it stands."""
    rule = getattr(builtin, name).element
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.3, "maximize": False, "adam_lr_ratio": 0.5, "momentum": 0.9}
    form = rule.adam(step, group)
    if form is None:
        assert name == "SGD"
        return
    generator = torch.Generator().manual_seed(step)
    made = [torch.randn(7, generator=generator) for _ in range(3)] + [torch.rand(7, generator=generator)]
    weight, grad, *state = made
    kernel = AdamWPart(weight.clone(), grad, *(values.clone() for values in state))
    coefficients = torch.tensor([rule.learning_rate(group) * form[0], 1.0])
    reference.adamw([kernel], coefficients, betas=group["betas"], eps=form[1])
    rule.update([weight], [grad], {key: [s] for key, s in zip(rule.state, state, strict=True)}, step, group)
    torch.testing.assert_close(kernel.weight, weight)
    torch.testing.assert_close([kernel.exp_avg, kernel.exp_avg_sq], state)


class Smoothed(MatrixRule):
    """Divide each channel by a smoothed norm of it, and the whole by the largest norm that this ever had."""

    name = "Smoothed"
    decay_first = True

    def __init__(self, axis):
        self.axis = axis

    def spec(self, m, n, group):
        return Spec(Reduce(self.axis, channel_norms=True), Reply(True, terms=1), State({"mean": 1}, ("peak",)))

    def owner_step(self, seen, state, group):
        state["mean"].lerp_(seen.norms[:, None], 0.1)
        scale = 1 / (state["mean"][:, 0] + 0.01)
        return Update(scale, seen.square_sums(scale * seen.norms)[:, None])

    def matrix_step(self, terms, state, group):
        peak = torch.maximum(state["peak"], terms[:, 0].sqrt().to(state["peak"].dtype))
        return 1 / (1 + peak), {"peak": peak}


class Momentum(Smoothed):
    """The same of a running average of the gradient, which the ranks keep for their own elements."""

    name = "Momentum"

    def spec(self, m, n, group):
        spec = super().spec(m, n, group)
        state = replace(spec.state, element=("average",))
        return replace(spec, reduce=replace(spec.reduce, of_carrier=True), state=state, carrier="average")

    def element_step(self, grad, state, group):
        state["average"].lerp_(grad, 0.2)


class ByRows(ShardedOptimizer):
    rules = Rules(Smoothed("rows"), adamw.AdamW())


class ByColumns(ShardedOptimizer):
    rules = Rules(Smoothed("columns"), adamw.AdamW())


class ByLarger(ShardedOptimizer):
    rules = Rules(Smoothed("larger"), adamw.AdamW())


class WithMomentum(ShardedOptimizer):
    rules = Rules(Momentum("columns"), adamw.AdamW())


OWN = {"rows": ByRows, "columns": ByColumns, "larger": ByLarger, "columns, momentum": WithMomentum}


class Dense:
    """``Smoothed`` for whole matrices in float64, and AdamW for the rest, from the equations."""

    def __init__(self, axis, weights, matrices):
        self.axis, self.matrices = axis, matrices
        self.weights = {name: w.detach().clone().double() for name, w in weights.items()}
        self.state, self.t = {}, 0

    def step(self, grads):
        self.t += 1
        lr, decay = OPTIONS["lr"], 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
        for name, grad in grads.items():
            W, G = self.weights[name], grad.double()
            if name in self.matrices:
                each = [(f"{name}{e}", G[e]) for e in range(len(G))] if G.dim() == 3 else [(name, G)]
                updates = [self.smoothed(*pair) for pair in each]
                W.mul_(decay).sub_(lr * (torch.stack(updates) if G.dim() == 3 else updates[0]))
            else:
                M, V = self.state.get(name, (torch.zeros_like(G), torch.zeros_like(G)))
                M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
                self.state[name] = M, V
                W -= lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t) * M / (V.sqrt() + 1e-6)
                W *= decay

    def smoothed(self, name, G):
        m, n = G.shape
        if "momentum" in self.axis:
            G = self.state[f"{name} average"] = 0.8 * self.state.get(f"{name} average", 0 * G) + 0.2 * G
        dim = 1 if self.axis == "rows" or (self.axis == "larger" and m >= n) else 0
        norms = G.norm(dim=dim, keepdim=True)
        mean, peak = self.state.get(name, (torch.zeros_like(norms), torch.zeros(())))
        mean = 0.9 * mean + 0.1 * norms
        U = G / (mean + 0.01)
        peak = torch.maximum(peak, U.norm())
        self.state[name] = mean, peak
        return U / (1 + peak)


def groups_by_rule(model, matrices):
    """Parameter groups, with names: the matrices follow the optimizer's rule, and all else AdamW."""
    low, rest = [], []
    for group in groups_of(model, matrices):
        (rest if group["rank"] is None else low).extend(group["params"])
    return [{"params": low}, {"params": rest, "rule": "hf_adamw"}]


WRAPS = {"plain": lambda model, world: model}
WRAPS |= {
    "fsdp2": lambda model, world: fsdp2(model, "", world),
    "fsdp1": lambda model, world: fsdp1(model, "full", world),
}


def train(axis, engines, rank, world, folder):
    """Weights after six steps under each engine in turn, the state moved by a checkpoint: the worst relative errors."""
    shapes, dense, errors = None, None, {}
    for number, engine in enumerate(engines):
        model = Bag(seed=number).double()
        shapes, ranks = shapes_of(model), low_rank(model, 1)
        dense = dense or Dense(axis, dict(model.named_parameters()), ranks)
        wrapped = WRAPS[engine](model, world)
        optimizer = OWN[axis](groups_by_rule(wrapped, ranks), model=wrapped, **OPTIONS)
        if number:
            checkpoint.load(folder, wrapped, optimizer)
        for step in range(6 * number, 6 * number + 6):
            wrapped(gradients(shapes, step, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
            dense.step(mean_gradients(shapes, step, world))
        errors[engine] = max(relative_error(p, dense.weights[name]) for name, p in whole(wrapped).items())
        checkpoint.save(folder, wrapped, optimizer)
        names = {key for slot in optimizer.named_state().values() for key in slot}
        assert {"mean", "peak"} <= names and "last_norm" not in names
    return errors


def train_zero(axis, stage, rank, world):
    """The same under ZeRO in fp32, without a checkpoint."""
    prepare()
    model = Bag()
    shapes, ranks = shapes_of(model), low_rank(model, 1)
    dense = Dense(axis, dict(model.named_parameters()), ranks)
    optimizer = OWN[axis](groups_by_rule(model, ranks), **OPTIONS)
    # DeepSpeed asks for this with every optimizer that it does not know.
    config = zero_config(stage, zero_allow_untested_optimizer=True)
    engine = initialize(model, config, optimizer=optimizer)
    for step in range(6):
        engine.backward(engine(gradients(shapes, step, rank, torch.float32)))
        engine.step()
        dense.step(mean_gradients(shapes, step, world, torch.float32))
    return max(relative_error(p, dense.weights[name]) for name, p in full_weights(engine, model).items())


def own_rule(rank, world, folder):
    errors = {axis: train(axis, ("fsdp2", "fsdp1", "fsdp2"), rank, world, f"{folder}/{axis}") for axis in OWN}
    return errors, {f"{axis}, stage {stage}": train_zero(axis, stage, rank, world) for axis in OWN for stage in (2, 3)}


@pytest.mark.parametrize("axis", OWN)
def test_a_rule_of_its_own_in_one_process(axis, tmp_path):
    errors = train(axis, ("plain", "plain"), 0, 1, str(tmp_path))
    assert max(errors.values()) < 1e-12


def test_the_documented_rule_is_this_one():
    """``docs/adding_a_rule.md`` shows it; its code takes the same steps."""
    page = Path(__file__).parents[2] / "docs" / "adding_a_rule.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    documented = {}
    exec(code, documented)
    models = []
    for kind in (ByRows, documented["SmoothedOptimizer"]):
        models.append(Bag())
        optimizer = kind(groups_by_rule(models[-1], low_rank(models[-1], 1)), **OPTIONS)
        for step in range(3):
            models[-1](gradients(shapes_of(models[-1]), step, 0, torch.float32)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.slow
def test_a_rule_of_its_own_under_every_engine(tmp_path):
    """float64: rounding in another order, 1e-15 a step; ZeRO's flat partitions are fp32: 6e-8 a step."""
    for exact, flat in run_ranks(own_rule, 2, str(tmp_path)):
        for axis, errors in exact.items():
            assert max(errors.values()) < 1e-9, f"{axis}: {errors}"
        assert max(flat.values()) < 1e-5, flat


GROUP = MappingProxyType(
    {
        "rank": 3,
        "proj": "random",
        "proj_type": "std",
        "scale_type": "channel",
        "disable_nl": False,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "scale": 4.0,
    }
)


def owner_step(R, norms, counts, state, group):
    """Both steps of the owner of some channels."""
    made = torch.empty(2, len(R), dtype=R.dtype)
    apollo.APOLLO().low_rank_step(Seen(R, None, torch.empty_like(R), counts), state, group, made)
    return apollo.APOLLO().owner_step(Seen(R[:, :0], norms, R[:, :0], counts, made=made), state, group)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_on_stacked_matrices_is_apollo_on_each(scale_type):
    group = {**GROUP, "scale_type": scale_type}
    torch.manual_seed(0)
    R, norms, counts = torch.randn(12, 3).double(), torch.rand(12).double(), [7, 1, 4]
    states = {
        name: torch.rand(12, width).double() for name, width in apollo.APOLLO().spec(9, 5, group).state.channel.items()
    }
    alone = {name: [part.clone() for part in torch.split(value, counts)] for name, value in states.items()}
    together = owner_step(R, norms, counts, states, group)
    at = 0
    for i, count in enumerate(counts):
        state = {name: parts[i] for name, parts in alone.items()}
        one = owner_step(R[at : at + count], norms[at : at + count], [count], state, group)
        torch.testing.assert_close(together.terms[i : i + 1], one.terms, rtol=1e-14, atol=0)
        for name, value in state.items():
            torch.testing.assert_close(states[name][at : at + count], value, rtol=1e-14, atol=0)
        if scale_type == "channel":
            torch.testing.assert_close(together.scale[at : at + count], one.scale, rtol=1e-14, atol=0)
        at += count


def test_apollo_follows_its_equations():
    torch.manual_seed(0)
    R, norms = torch.randn(5, 3).double(), torch.rand(5).double()
    M, V = torch.rand(5, 3).double(), torch.rand(5, 3).double()
    state = dict(zip(apollo.APOLLO().spec(5, 4, GROUP).state.channel, (M.clone(), V.clone()), strict=True))
    found = owner_step(R, norms, [5], state, GROUP)
    M, V = 0.9 * M + 0.1 * R, 0.99 * V + 0.01 * R * R
    N = M / (V.sqrt() + 1e-6)
    s = N.norm(dim=1) / (R.norm(dim=1) + 1e-8)
    torch.testing.assert_close(found.scale, s, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.terms, (s * norms).square().sum()[None, None], rtol=1e-13, atol=0)


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [2], [1, 2, 2, 0, 1, 2], [3, 0]])
def test_terms_are_added_to_their_matrices_in_order(members):
    torch.manual_seed(0)
    terms, out = torch.randn(len(members), 2), torch.randn(4, 3)
    want = out.clone()
    for k, row in zip(members, terms, strict=True):
        want[k, :2] += row
    own._add_terms(terms, members, out)
    assert torch.equal(out, want)


def test_a_matrix_step_leaves_its_state_to_the_caller():
    """Matrices without a gradient keep theirs, which the rule does not know."""
    (name,) = apollo.APOLLO().spec(5, 4, GROUP).state.matrix
    last = torch.tensor([0.0, 1.0, 1.0])
    factor, changed = apollo.APOLLO().matrix_step(torch.tensor([[4.0], [4.0], [0.25]]), {name: last}, GROUP)
    torch.testing.assert_close(factor, torch.tensor([1.0, 1.01 * (1 + 1e-8) / 2, 1.0]))
    torch.testing.assert_close(changed[name], torch.tensor([2.0, 1.01, 0.5]))
    assert torch.equal(last, torch.tensor([0.0, 1.0, 1.0]))


def test_rules_are_short():
    for path in (Path(apollo_dist.__file__).parent / "rules").glob("*.py"):
        if path.name != "base.py":
            assert len(path.read_text().splitlines()) <= 120, path


def state_names():
    """The names of all state that the rules of the package declare."""
    found = set(apollo.APOLLO().spec(5, 4, GROUP).state.names)
    for module in (adamw, scale, sgd):
        found |= {name for kind in vars(module).values() if hasattr(kind, "state_of") for name in kind.state}
    view = {**{key: option.default for key, option in scale.SCALE.options.items()}, "role": Role(HEAD)}
    return found | set(scale.SCALE().spec(5, 4, view).state.names)


def test_no_state_is_named_outside_of_its_rule():
    """Step, exchange, state, checkpoints and estimates loop over what a rule declares."""
    package = Path(apollo_dist.__file__).parent
    names = state_names()
    assert len(names) == 4
    # The state of torch's own AdamW, which is trained for comparison, and by what others' states are recognized.
    allowed = {package / "checkpoint" / "elementwise.py", package / "state" / "loaded.py"}
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "rules" or path in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert not any(name == text or f".{name}" in text for name in names), f"{path}:{node.lineno} names {text!r}"
