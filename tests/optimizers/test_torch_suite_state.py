"""What torch's tests ask of an optimizer's state dicts and hooks, asked of APOLLO."""

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from apollo_dist import APOLLO, AdamW

from .torch_suite import build, equal_state, every_input, problem, same, take

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
    """Without seed and version, with ``step`` as a number, once its projections are accepted; the log says so."""
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
    with pytest.raises(ValueError, match="saved by an older apollo_dist, whose random projections were"):
        other.load_state_dict(state)
    other.accept_at_load("projections")
    with caplog.at_level("WARNING", "apollo_dist"):
        other.load_state_dict(state)
    assert [r.message for r in caplog.records if "version 0.1" in r.message]
    take(optimizer, loss, 3)
    take(other, of_twins, 3)
    assert same(params, twins)
    assert other.state_dict()["param_groups"][0]["state_version"] == 2


def test_states_of_older_projections_are_refused():
    """Of version 1, also in a pickle; not where a rule has no projections, or an optimizer no state."""
    params, loss = problem()
    optimizer = APOLLO(params, rank=2)
    take(optimizer, loss, 2)

    def of_version_1(state):
        for group in state["param_groups"]:
            group["state_version"] = 1
        return state

    state = of_version_1(copy.deepcopy(optimizer.state_dict()))
    other = APOLLO(problem()[0], rank=2)
    with pytest.raises(ValueError, match=r'or call optimizer.accept_at_load\("projections"\) before load_state_dict'):
        other.load_state_dict(state)
    assert not other.state
    with pytest.raises(ValueError, match="generated in another way"):
        copy.copy(optimizer).__setstate__(of_version_1(optimizer.__getstate__()))
    other.load_state_dict({**state, "state": {}})
    params, loss = problem()
    plain = AdamW(params)
    take(plain, loss, 1)
    AdamW(problem()[0]).load_state_dict(of_version_1(plain.state_dict()))


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
