"""The choice of matrices is made once: groups that are added, names, copies; and the table that shows it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import nn

import apollo_dist
from apollo_dist import APOLLO

from .models import BLOCKS, Net, grouped, linear, stepped

# Made once and kept.


class Frozen(nn.Module):
    """The model of Lightning's fine-tuning: a frozen layer, another one, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.layers[0].requires_grad_(False)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("steps", [0, 1])
def test_bare_parameters_do_not_join_named_ones(steps: int) -> None:
    model = Frozen()
    optimizer = APOLLO(model.trained(), rank=4)
    for _ in range(steps):
        stepped(optimizer)
    model.layers[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"2 of 2 parameters, .* came without a name, and others with one"):
        optimizer.add_param_group({"params": list(model.layers[0].parameters())})
    assert len(optimizer.param_groups) == 1
    assert stepped(optimizer) == {"layers.1.weight"}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("way", ["model=", "attach"])
def test_bare_parameters_are_named_by_a_model_that_is_known(steps: int, way: str) -> None:
    model = Frozen()
    optimizer = APOLLO(model.trained(), rank=4, model=model if way == "model=" else None)
    if way == "attach":
        optimizer.attach(model)
    for _ in range(steps):
        stepped(optimizer)
    model.layers[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.layers[0].parameters())})
    assert stepped(optimizer) == {"layers.0.weight", "layers.1.weight"}
    assert optimizer.param_groups[1]["param_names"] == ["layers.0.weight", "layers.0.bias"]


def test_a_group_that_is_added_to_a_models_optimizer_is_chosen_by_the_same_rule() -> None:
    later = nn.ModuleList([nn.ModuleDict({"table": nn.Embedding(8, 64), "map": linear()})])
    for way in ("model", "names"):
        model = Net()
        if way == "model":
            optimizer = APOLLO(model, rank=4)
        else:
            optimizer = APOLLO(model.named_parameters(), rank=4, model=model)
        model.later = copy.deepcopy(later)
        optimizer.add_param_group({"params": list(model.later.named_parameters(prefix="later")), "lr": 0.1})
        assert stepped(optimizer) == BLOCKS | {"later.0.map.weight"}
    # In an optimizer of explicit groups a group without rank stays AdamW's, as it always was.
    explicit = APOLLO([{"params": [("a.0.weight", nn.Parameter(torch.ones(8, 8)))], "rank": 2}])
    explicit.add_param_group({"params": [("a.1.weight", nn.Parameter(torch.ones(8, 8)))]})
    assert stepped(explicit) == {"a.0.weight"}


def test_a_frozen_part_of_the_model_moves_to_the_group_that_it_is_added_to() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([linear(), linear()])})
    model.layers[1].requires_grad_(False)
    optimizer = APOLLO(model, rank=4, lr=0.1)
    assert stepped(optimizer) == {"layers.0.weight"}
    model.layers[1].requires_grad_(True)
    with pytest.raises(ValueError, match="lr must be >= 0"):
        optimizer.add_param_group({"params": [("layers.1.weight", model.layers[1].weight)], "lr": -1.0})
    with pytest.raises(ValueError, match=r"rank 65 is larger than layers.1.weight"):
        optimizer.add_param_group({"params": [("layers.1.weight", model.layers[1].weight)], "rank": 65})
    assert names_in(optimizer) == [["layers.0.weight", "layers.1.weight"]]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    optimizer.add_param_group({"params": list(model.layers[1].parameters()), "lr": 0.2})
    assert names_in(optimizer) == [["layers.0.weight"], ["layers.1.weight"]]
    assert stepped(optimizer) == {"layers.0.weight", "layers.1.weight"}
    with pytest.raises(ValueError, match=r"layers.1.weight .* is given twice"):
        optimizer.add_param_group({"params": [("layers.1.weight", model.layers[1].weight)]})


def test_rank_none_leaves_a_group_to_adamw() -> None:
    model = Net()
    named = dict(model.named_parameters())
    mlp = [(n, p) for n, p in named.items() if "mlp" in n]
    rest = [(n, p) for n, p in named.items() if "mlp" not in n]
    optimizer = APOLLO([{"params": rest}, {"params": mlp, "rank": None}], rank=4)
    assert stepped(optimizer) == {name for name in BLOCKS if "mlp" not in name}
    optimizer = APOLLO(Net(), rank=4)
    optimizer.add_param_group({"params": [("more.0.weight", nn.Parameter(torch.ones(8, 8)))], "rank": None})
    assert "more.0.weight" not in stepped(optimizer)


def test_copies_keep_the_choice() -> None:
    """A copy knows no model, and names alone would choose otherwise."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"map": linear(), "table": nn.Embedding(8, 64)})])})
    optimizer = APOLLO(model.named_parameters(), rank=4, model=model)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert stepped(other) == {"layers.0.map.weight"}
    stepped(optimizer)
    fresh = APOLLO(model.named_parameters(), rank=4, model=model)
    fresh.load_state_dict(optimizer.state_dict())
    assert stepped(fresh) == {"layers.0.map.weight"}
    # Groups of another optimizer are those that it was given.
    assert stepped(APOLLO(optimizer.param_groups, rank=4, model=model)) == {"layers.0.map.weight"}
    with pytest.raises(ValueError, match="chose matrices for rank 4, and this one is to choose for rank 8"):
        APOLLO(optimizer.param_groups, rank=8, model=model)


def test_a_model_that_is_attached_later_changes_nothing() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"map": linear(), "table": nn.Embedding(8, 64)})])})
    optimizer = APOLLO(model.named_parameters(), rank=4)
    before = stepped(optimizer)
    assert before == {"layers.0.map.weight", "layers.0.table.weight"}
    optimizer.attach(model)
    assert stepped(optimizer) == before
    model.layers.append(nn.ModuleDict({"map": linear(), "table": nn.Embedding(8, 64)}))
    optimizer.add_param_group({"params": list(model.layers[1].parameters())})
    assert stepped(optimizer) == before | {"layers.1.map.weight"}
    bare = APOLLO(model.parameters(), rank=4)
    stepped(bare)
    with pytest.raises(ValueError, match="attach comes before the first step"):
        bare.attach(model)


# ``param_names``.


def names_in(optimizer: torch.optim.Optimizer) -> list[list[str] | None]:
    saved = [group.get("param_names") for group in optimizer.state_dict()["param_groups"]]
    assert saved == [group.get("param_names") for group in optimizer.param_groups]
    return saved


def test_param_names_are_those_that_torch_keeps() -> None:
    model = Net()

    def ways() -> Iterable[object]:
        yield list(model.named_parameters())
        yield [{"params": [(n, p)]} for n, p in model.named_parameters()]
        yield list(model.parameters())

    for ours, theirs in zip(ways(), ways(), strict=True):
        optimizer = APOLLO(ours, rank=4)
        assert names_in(optimizer) == names_in(torch.optim.AdamW(theirs))  # type: ignore[arg-type]
        stepped(optimizer)
        assert names_in(optimizer) == names_in(torch.optim.AdamW(theirs))  # type: ignore[arg-type]


def test_param_names_are_read() -> None:
    model = Net()
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer = APOLLO([{"params": list(parameters), "param_names": list(names)}], rank=4)
    assert names_in(optimizer) == [list(names)]
    assert stepped(optimizer) == BLOCKS
    assert names_in(APOLLO(model.parameters(), rank=4, model=model)) == [list(names)]
    assert [name for group in names_in(APOLLO(model, rank=4)) for name in group or ()] != []
    with pytest.raises(ValueError, match=r"param_names must be 12 names, one for each parameter, got 1: 'one'"):
        APOLLO([{"params": list(parameters), "param_names": ["one"]}], rank=4)
    with pytest.raises(ValueError, match=r"is 'embed.weight' in params and 'other' in param_names"):
        APOLLO([{"params": [("embed.weight", model.embed.weight)], "param_names": ["other"]}], rank=4)


# The table and the command.


def test_describe_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = grouped()
    model.layers[0].requires_grad_(False)
    apollo_dist.describe(model, rank=32)
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["parameter", "shape", "update", "why"]
    assert [row.split("  ")[0].strip() for row in rows][:2] == ["embed.weight", "layers.*.q.weight"]
    text = "\n".join(" ".join(row.split()) for row in rows)
    assert "layers.*.q.weight 64 x 64 frozen (low-rank) linear map in a repeated block" in text
    assert "layers.*.k.weight 16 x 64 AdamW rank 32 > 16, its smaller side" in text
    assert "head.weight 100 x 64 AdamW output head: gives the 100 numbers of the vocabulary or classes" in text
    assert last == "2 of 5 parameters are low-rank, 37.2 % of 22,016 elements; 3 more are frozen"
    apollo_dist.describe(model, rank=32, every=True)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8 + 1
