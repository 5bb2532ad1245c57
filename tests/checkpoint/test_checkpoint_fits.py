"""Checkpoints and what they are loaded into: another model or optimizer is an error, less precision is told."""

from __future__ import annotations

import pytest
import torch

from apollo_dist import APOLLO, APOLLOMini, checkpoint
from apollo_dist.checkpoint import contents
from apollo_dist.checkpoint.elementwise import _set_number

from ..models import Bag, groups_of, low_rank
from .checkpoint_kills import build, snapshot, step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoint of one step."""
    root = tmp_path_factory.mktemp("saved")
    model, optimizer = build(seed=0)
    step(model, optimizer, 1)
    checkpoint.save(root, model, optimizer)
    return root


@pytest.mark.parametrize(
    ("build_other", "words"),
    [
        (lambda m: APOLLO(groups_of(m, low_rank(m, 3)), seed=1), ("seed of the projections is 0, and here it is 1",)),
        (lambda m: APOLLO(groups_of(m, low_rank(m, 2))), ("rank of layers.", "was 3, and here it is 2")),
        (lambda m: APOLLO(groups_of(m, {**low_rank(m, 3), "embed.linear.weight": 2})), ("kind of embed",)),
        (
            lambda m: APOLLO(groups_of(m, low_rank(m, 3)), proj_type="rademacher"),
            ("the projection of layers.", "had gaussian entries, and here it has rademacher ones"),
        ),
        (lambda m: torch.optim.AdamW(m.parameters()), ("its optimizer is APOLLO, and here it is AdamW",)),
    ],
    ids=["seed", "rank", "choice", "signs", "optimizer"],
)  # fmt: skip
def test_another_optimizers_checkpoint_is_an_error(saved, build_other, words):
    model = Bag(99)
    with pytest.raises(ValueError) as caught:
        checkpoint.load(saved, model, build_other(model))
    assert all(word in str(caught.value) for word in words), caught.value


def test_low_rank_moments_of_older_projections_are_refused_or_accepted(tmp_path, monkeypatch):
    """As version 1 saved them; another seed is accepted alike."""
    model, optimizer = build(seed=0)
    step(model, optimizer, 1)
    with monkeypatch.context() as patched:
        patched.setattr(contents, "PROJECTIONS", 1)
        checkpoint.save(tmp_path, model, optimizer)
    other, its = build(seed=99)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r'accept_at_load\("projections"\) before checkpoint.load to go on'):
        checkpoint.load(tmp_path, other, its)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))
    checkpoint.load(tmp_path, Bag(99), None)
    its.accept_at_load("projections")
    checkpoint.load(tmp_path, other, its)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="generated in another way"):  # accepted once
        checkpoint.load(tmp_path, other, its)
    reseeded = APOLLO(groups_of(other, low_rank(other, 3)), seed=1)
    reseeded.accept_at_load("projections", "seed")
    checkpoint.load(tmp_path, other, reseeded)


def test_another_models_checkpoint_is_an_error(saved):
    model = Bag(99, experts=False)
    model.layers[0].norm = torch.nn.Parameter(torch.ones(8))
    model.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError) as caught:
        checkpoint.load(saved, model, APOLLO(groups_of(model, low_rank(model, 3))))
    for words in (
        "it has no extra",
        f"its layers.{len(model.layers)}.weight is not in the model",
        "shape of layers.0.norm was [7]",
    ):
        assert words in str(caught.value)


def test_a_parameter_without_a_name_is_an_error(tmp_path):
    model = Bag()
    optimizer = APOLLO([{"params": [p for p in model.parameters() if p.dim() == 2], "rank": 1}])
    with pytest.raises(ValueError, match="knows a parameter as param_0, which is no name of the model's"):
        checkpoint.save(tmp_path, model, optimizer)


def test_what_cannot_be_read_back_is_refused_when_saving(tmp_path):
    model, optimizer = build(seed=0)
    with pytest.raises(ValueError, match="extra may hold numbers"):
        checkpoint.save(tmp_path, model, optimizer, {"model": model})
    with pytest.raises(ValueError, match="keep must be an integer >= 1"):
        checkpoint.save(tmp_path, model, optimizer, keep=0)
    assert not any(tmp_path.iterdir())


def test_an_optimizer_whose_state_is_not_known_is_refused(tmp_path):
    model = Bag()
    with pytest.raises(ValueError, match=r"torch's AdamW, Adam without amsgrad; the optimizer is torch.optim.sgd.SGD"):
        checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="pass the optimizer that trains the model, got NoneType"):
        checkpoint.save(tmp_path, model)
    with pytest.raises(ValueError, match="is not in the model"):
        checkpoint.save(tmp_path, model, torch.optim.AdamW(Bag().parameters()))


def test_counts_that_must_be_one_and_are_not(tmp_path):
    """Under ZeRO the parameters of a group share a count; where it was saved each may have had its own."""
    state = {"step": torch.tensor(0.0)}
    with pytest.raises(ValueError, match=r"the step of a, b differ \(b: 3.0\), and here they share one"):
        _set_number(state, "step", {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])})


def test_loading_into_less_precision_is_told(tmp_path, caplog):
    model, optimizer = build(seed=0)
    checkpoint.save(tmp_path, model, optimizer)
    low = Bag(99).bfloat16()
    checkpoint.load(tmp_path, low, APOLLO(groups_of(low, low_rank(low, 3)), update_proj_gap=3))
    assert f"{len(list(low.parameters()))} tensors lose precision, such as" in caplog.text
    assert "float32 in the checkpoint, bfloat16 here" in caplog.text
    for (name, p), q in zip(model.named_parameters(), low.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q), name


def test_mini_continues_exactly(tmp_path):
    """Tensor scaling, rank 1, and options that were changed after construction."""
    runs = []
    for number in range(2):
        model = Bag(number)
        optimizer = APOLLOMini([g | {"rank": g["rank"] and 1} for g in groups_of(model, low_rank(model, 1))])
        if number == 0:
            optimizer.param_groups[0]["lr"] = 0.02
            optimizer.param_groups[1]["weight_decay"] = 0.3
            step(model, optimizer, 0)
            checkpoint.save(tmp_path, model, optimizer)
        else:
            checkpoint.load(tmp_path, model, optimizer)
        step(model, optimizer, 1)
        runs.append(snapshot(model, optimizer))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
