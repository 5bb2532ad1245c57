"""Parameters that are replaced in the model after the first step: followed by name, or an error; never ignored."""

import copy
import gc
import logging
import sys

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, checkpoint
from apollo_dist.optimizers.model_changes import Watch

from ..ranks import run_ranks


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(8, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self):
        x = self.emb.weight
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().sum()


def step(model, optimizer):
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


class Wrapped(nn.Module):
    """As LoRA wraps a linear layer: the weight keeps its identity, or gets a new one, under another name."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, nn.Parameter(torch.zeros(16, 16))

    def forward(self, x):
        return self.base(x) + x @ self.extra


def assign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def other_module(model):
    old = model.layers[1]
    model.layers[1] = nn.Linear(16, 16)
    model.layers[1].load_state_dict(old.state_dict())


def other_block_list(model):
    model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.layers)


def one_parameter(model):
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().clone())


def deleted_and_made_again(model):
    weight = model.emb.weight.detach().clone()
    del model.emb
    model.emb = nn.Embedding.from_pretrained(weight, freeze=False)


def overwrite(model):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.to(torch.float64)
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def swap(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    model.to(torch.float64)
    torch.__future__.set_swap_module_params_on_conversion(False)


def in_place(model):
    model.to(torch.float64)


KEEPING = (assign, other_module, other_block_list, one_parameter, deleted_and_made_again)


@pytest.mark.parametrize("change", [*KEEPING, overwrite, swap, in_place])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_knows_its_optimizer_is_followed(change, steps):
    model, twin = Network(), Network()
    optimizer, undisturbed = APOLLO(model, rank=4), APOLLO(twin, rank=4)
    for _ in range(steps):
        step(model, optimizer)
        step(twin, undisturbed)
    change(model)
    if change not in KEEPING:
        in_place(twin)  # converts as the others do, and is never followed
    for _ in range(3):
        step(model, optimizer)
        step(twin, undisturbed)
    expected = dict(twin.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert optimizer.state_dict()["state"].keys() == undisturbed.state_dict()["state"].keys()


def resized(model):
    model.emb = nn.Embedding(12, 16)


def resized_in_place(model):
    model.emb.weight.data = torch.randn(12, 16)


def renamed(model):
    model.layers[1] = Wrapped(copy.deepcopy(model.layers[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resized, "emb.weight had shape .8, 16. when the optimizer was built, and the model now has one of shape .12"),
        (resized_in_place, "emb.weight had shape .8, 16. at the last step and has .12, 16. now"),
        (renamed, "layers.1.weight and 1 others are no longer in the model, which has layers.1"),
    ],
)
def test_what_cannot_be_followed_is_an_error(change, message):
    model = Network()
    optimizer = APOLLO(model, rank=4)
    step(model, optimizer)
    change(model)
    with pytest.raises(ValueError, match=message):
        step(model, optimizer)


@pytest.mark.parametrize("change", [*KEEPING, resized])
@pytest.mark.parametrize("named", [True, False])
def test_without_the_model_it_is_an_error(change, named):
    model = Network()
    matrices = [(n, p) if named else p for n, p in model.named_parameters()]
    optimizer = APOLLO(matrices, rank=4)
    step(model, optimizer)
    change(model)
    with pytest.raises(ValueError, match="were replaced in Network after the optimizer was built from parameters"):
        step(model, optimizer)


def test_parameters_that_leave_or_come_are_told(caplog):
    model = Network()
    optimizer = APOLLO(model, rank=4)
    step(model, optimizer)
    with caplog.at_level(logging.WARNING, "apollo_dist"):
        model.layers[1] = Wrapped(model.layers[1])  # the weight is the same object, and goes on training
        before = model.layers[1].base.weight.detach().clone()
        step(model, optimizer)
        assert "new parameters that no parameter group holds, such as layers.1.extra (1)" in caplog.text
        assert not torch.equal(before, model.layers[1].base.weight)
        del model.layers[1]
        step(model, optimizer)
        assert "no longer in the model; they are left alone" in caplog.text
        caplog.clear()
        step(model, optimizer)
        assert not caplog.text


def test_a_frozen_parameter_in_no_group_that_trains_later_is_told(caplog):
    model = Network()
    model.emb.requires_grad_(False)
    optimizer = APOLLO([(n, p) for n, p in model.named_parameters() if p.requires_grad], rank=4, model=model)
    step(model, optimizer)
    model.emb.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "apollo_dist"):
        step(model, optimizer)
        step(model, optimizer)
    assert caplog.text.count("emb.weight and 0 others require a gradient by now") == 1


def test_modules_that_are_no_parameters_do_not_matter():
    model = Network()
    optimizer = APOLLO(model, rank=4)
    step(model, optimizer)
    plan = next(iter(optimizer._parts.plans.built.values()))
    model.probe = nn.ReLU()
    model.emb.register_forward_hook(lambda *_: None)
    step(model, optimizer)
    assert next(iter(optimizer._parts.plans.built.values())) is plan


def dropped_model(rank: int, world: int) -> bool:
    """Whether a model is gone once its owner has dropped it, while its optimizer lives and steps."""
    model = Network()
    optimizer = APOLLO(model, rank=4)
    step(model, optimizer)
    watch = optimizer._parts.following.watch
    del model
    gc.collect()
    gone = watch.model() is None
    optimizer.step()
    return gone


def test_the_model_is_not_kept_alive():
    """In a process of its own: what other tests leave behind may hold a model as well."""
    assert run_ranks(dropped_model, 1) == [True]


def test_looking_at_the_model_costs_little():
    """A few calls a parameter, whatever the machine; the model is walked in every step."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()) for _ in range(200)])
    watch, calls = Watch(model), [0]
    assert not watch.changed()

    def count(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        changed = watch.changed()
    finally:
        sys.setprofile(None)
    assert not changed
    assert 0 < calls[0] / 200 <= 6


# Checkpoints.


def test_weights_alone_and_the_rule_for_lr_and_decay(tmp_path, caplog):
    model = Network()
    optimizer = APOLLO(model, rank=4, weight_decay=0.1)
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 3e-3
    checkpoint.save(tmp_path, model, optimizer)
    alone = Network()
    nn.init.zeros_(alone.emb.weight)
    other = APOLLO(alone, rank=2, seed=5, lr=0.5)
    assert checkpoint.load(tmp_path, alone, None).step == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))
    assert other.param_groups[0]["lr"] == 0.5
    again = Network()
    resumed = APOLLO(again, rank=4)
    with caplog.at_level(logging.INFO, "apollo_dist"):
        checkpoint.load(tmp_path, again, resumed)
    assert "learning rate and decay are the checkpoint's: group 0: lr 0.003 (was 0.01), weight_decay 0.1 (was 0.0)" in (
        caplog.text
    )
    assert resumed.param_groups[0]["lr"] == 3e-3
    resized(alone)
    with pytest.raises(ValueError, match=r"shape of emb\.weight was"):
        checkpoint.load(tmp_path, alone, None)
    with pytest.raises(ValueError, match="pass the optimizer that trains the model"):
        checkpoint.save(tmp_path, model, None)


def test_what_was_frozen_when_it_was_saved_begins_at_zero(tmp_path, caplog):
    model = Network()
    model.layers[0].requires_grad_(False)
    optimizer = APOLLO(model, rank=4)
    step(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer)
    twin = Network()
    other = APOLLO(twin, rank=4)
    step(twin, other)  # state that the load has to clear
    with caplog.at_level(logging.INFO, "apollo_dist"):
        checkpoint.load(tmp_path, twin, other)
    assert "no state for 2 parameters that were frozen when it was saved" in caplog.text
    model.requires_grad_(True)
    for _ in range(2):
        step(model, optimizer)
        step(twin, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
