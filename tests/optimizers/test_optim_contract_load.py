"""What a loaded state is, where it goes, and which states are refused when they are loaded."""

import copy
import re
import time

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO

from .test_optim_contract import Network, give, train
from .test_optim_contract_state import continues


def two_groups(reverse=False):
    model = Network()
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, named[n]) for n in ("0.weight", "1.weight")], "rank": 3},
        {"params": [(n, named[n]) for n in ("0.bias", "1.bias")]},
    ]
    if reverse:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    return model, APOLLO(groups, lr=0.02, update_proj_gap=2)


def test_another_order_of_parameters_and_groups_goes_by_name(caplog):
    model, optimizer = two_groups()
    train(model, optimizer, range(4))
    twin, other = two_groups(reverse=True)
    twin.load_state_dict(model.state_dict())
    with caplog.at_level("WARNING", "apollo_dist"):
        other.load_state_dict(optimizer.state_dict())
    assert "come in another order than they were saved in" in caplog.text
    continues(model, optimizer, twin, other)


def test_states_of_other_optimizers_are_refused_at_load():
    model, optimizer = two_groups()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    train(model, optimizer, [0])
    saved = optimizer.state_dict()
    adam = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    give(model, 0)
    adam.step()
    zeros = {i: {"step": 1, "exp_avg": torch.zeros(1), "projector": object()} for i in range(4)}
    eight_bit = {i: {"step": 1, "state1": torch.zeros(1), "absmax1": torch.zeros(1)} for i in range(4)}
    for state, whose in (
        (adam.state_dict(), "it looks like AdamW's"),
        ({**saved, "state": zeros}, "it looks like apollo-torch's or GaLore's"),
        ({**saved, "state": eight_bit}, "it looks like bitsandbytes'"),
    ):
        other = two_groups()[1]
        with pytest.raises(ValueError, match=whose):
            other.load_state_dict(state)
        assert not other.state
        with pytest.raises(ValueError, match="of another optimizer"):
            APOLLO(params[:2], rank=3).load_state_dict(
                {
                    "state": {0: adam.state_dict()["state"][0]},
                    "param_groups": [{**adam.state_dict()["param_groups"][0], "params": [0, 1]}],
                }
            )


def test_what_was_saved_and_what_is_here(caplog):
    model, optimizer = two_groups()
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()

    def loaded(change, **options):
        state = copy.deepcopy(saved)
        change(state)
        twin, other = two_groups()
        for key, value in options.items():
            other.param_groups[0][key] = value
        caplog.clear()
        with caplog.at_level("WARNING", "apollo_dist"):
            other.load_state_dict(state)
        return twin, other

    for key, value in (("scale_type", "tensor"), ("update_proj_gap", 7), ("weight_decay", 0.5)):
        _, other = loaded(lambda state: None, **{key: value})
        assert f"{key} of parameter group 0 was {value} and is {saved['param_groups'][0][key]}" in caplog.text
        assert other.param_groups[0][key] == saved["param_groups"][0][key]
    twin, other = loaded(lambda state: state["state"].pop(1))
    assert "nothing for 1 parameters, which start anew: 1.weight" in caplog.text
    train(twin, other, [2])
    assert [float(s["step"]) for s in other.state_dict()["state"].values()] == [3, 1, 3, 3]
    for change, message in (
        (lambda s: s["param_groups"][0].update(rank=2), "the rank of parameter group 0 was 2"),
        (lambda s: s["param_groups"][0].update(seed=5), "projections of seed 5"),
        (lambda s: s["param_groups"][0].update(state_version=9), "knows versions up to 2"),
        (lambda s: s["param_groups"][0].update(state_version=1), "saved by an older apollo_dist"),
        (
            lambda s: s["param_groups"][0].update(proj_type="rademacher"),
            "proj_type of parameter group 0 was 'rademacher'",
        ),
        (lambda s: s["param_groups"][0].update(proj="svd"), "proj of parameter group 0 was 'svd'"),
        (lambda s: s["param_groups"][0]["param_names"].__setitem__(1, "2.weight"), "was named 2.weight"),
        (lambda s: s["state"][0].update(step=float("nan")), "which is no number of steps"),
        (lambda s: s["state"].update({2: 5}), "is a int, not a dictionary"),
        (lambda s: s["state"].update({2: s["state"][0]}), "0.bias takes AdamW"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            loaded(change)
    with pytest.raises(ValueError, match="accept_at_load takes"):
        optimizer.accept_at_load("rank")


@pytest.mark.slow
def test_loading_thousands_of_parameters_takes_seconds():
    """Names are looked up, not searched for: 3,000 of them in each direction."""
    params = [(f"layers.{i}.weight", nn.Parameter(torch.ones(2, 2))) for i in range(3000)]
    optimizer = APOLLO(params, rank=1)
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    start = time.monotonic()
    optimizer.load_state_dict(state)
    optimizer.step()
    assert time.monotonic() - start < 30
    assert {float(s["step"]) for s in optimizer.state_dict()["state"].values()} == {2.0}
