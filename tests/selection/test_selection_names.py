"""Which matrices are low-rank by names alone, what is too small for the rank, and what the log says."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, APOLLOMini, param_groups
from apollo_dist.selection import by_name

from ..rules.problems import Llama
from .models import BLOCKS, Block, GroupedExperts, Net, grouped, linear, stepped

# Names, where there is no model.


@pytest.mark.parametrize(
    ("name", "shape", "low_rank"),
    [
        ("layers.0.multi_head_attention.q.weight", (64, 64), True),
        ("layers.0.vision_embed_tokens.weight", (64, 64), True),
        ("layers.0.vision_embed_tokens.proj.weight", (64, 64), True),
        ("layers.0.w", (64, 64), True),
        ("h.0.attn.c_attn.weight", (64, 192), True),
        ("encoder.layers.encoder_layer_0.mlp.0.weight", (64, 64), True),
        ("layers.0.self_attn.in_proj_weight", (192, 64), True),
        ("blocks.0.sa.heads.0.key.weight", (16, 64), True),
        ("layers.0.norm1.linear.weight", (64, 64), True),
        ("layers.0.mlp.experts.gate_up_proj", (8, 64, 64), True),
        ("layers.0.mlp.experts.3.w1.weight", (64, 64), True),
        ("layers.0.mlp.gate.weight", (256, 64), True),
        ("lm_out_heads.0.weight", (100, 64), False),
        ("heads.0.proj.weight", (64, 64), False),
        ("classifier.6.weight", (10, 64), False),
        ("layers.0.shared_head.head.weight", (100, 64), False),
        ("embeddings.0.weight", (100, 64), False),
        ("layers.0.embed_tokens.weight", (100, 64), False),
        ("block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False),
        ("layers.0.attn.relative_position_bias_table", (49, 8), False),
        ("layers.0.mixer.A_log", (64, 16), False),
        ("layers.0.mixer.conv1d.weight", (64, 4, 4), False),
        ("layers.0.q_norm.weight", (8, 64), False),
        ("layers.0.mlp.router.weight", (8, 64), False),
        ("layers.0.mlp.experts.gate_up_proj_bias", (8, 128), False),
        ("layers.0.rel_attn.q", (64, 4, 16), False),
        ("layers.0.bias", (8, 64), False),
        ("mlp.fc1.weight", (64, 64), False),
        ("layers.0.norm.weight", (64,), False),
        ("layers.0.empty.weight", (0, 64), False),
    ],
)  # fmt: skip
def test_names_alone(name: str, shape: tuple[int, ...], low_rank: bool) -> None:
    assert by_name.judge({name: shape})[name].candidate == low_rank


def test_names_show_routers_by_their_experts() -> None:
    stacked = {"layers.0.mlp.experts.up": (8, 64, 64), "layers.0.mlp.gate.weight": (8, 64)}
    listed = {f"layers.0.mlp.experts.{i}.up.weight": (64, 64) for i in range(8)} | {"layers.0.mlp.gate.weight": (8, 64)}
    dense = {"layers.0.mlp.up.weight": (64, 64), "layers.0.mlp.gate.weight": (8, 64)}
    for shapes, router in ((stacked, True), (listed, True), (dense, False)):
        assert by_name.judge(shapes)["layers.0.mlp.gate.weight"].candidate != router


def test_names_decide_where_no_model_is_known() -> None:
    model = Net(vision=nn.ModuleList([nn.ModuleDict({"vision_embed_tokens": linear(), "table": nn.Embedding(8, 64)})]))
    by_names = stepped(APOLLO(model.named_parameters(), rank=4))
    assert by_names == BLOCKS | {"vision.0.vision_embed_tokens.weight", "vision.0.table.weight"}
    assert stepped(APOLLO(model.named_parameters(), rank=4, model=model)) == by_names - {"vision.0.table.weight"}


def test_names_of_ones_own_go_with_the_models_structure() -> None:
    model = Net()
    optimizer = APOLLO([(f"mine.{n}", p) for n, p in model.named_parameters()], rank=4, model=model)
    assert stepped(optimizer) == {f"mine.{name}" for name in BLOCKS}


# What is too small, and what the log says.


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if "AdamW takes: " in r.getMessage()]


ADAMW_TOO = {f"layers.{i}.k.weight" for i in (0, 1)}
QO = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in "qo"}


def test_what_cannot_take_the_rank_goes_to_adamw_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = grouped()
    ways = (
        lambda: APOLLO(model, rank=32),
        lambda: APOLLO(model.named_parameters(), rank=32),
        lambda: APOLLO(model.parameters(), rank=32, model=model),
        lambda: APOLLO(param_groups(model, rank=32)),
    )
    for make in ways:
        caplog.clear()
        with caplog.at_level(logging.INFO, "apollo_dist"):
            assert stepped(make()) == QO
        ((level, line),) = lines(caplog)
        assert level == "WARNING"
        assert "rank 32 is larger than a side of layers.*.k.weight (2): rank=16 would take all of these" in line
        assert "embed.weight, 20.5 % of the elements: " in line
        assert "rank=, exclude='regex', or parameter groups with a rank of their own" in line
    assert stepped(APOLLO(model, rank=16)) == QO | ADAMW_TOO


def test_large_matrices_that_adamw_takes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(side=linear(), excluded=nn.ModuleList([Block()]))
    with caplog.at_level(logging.INFO, "apollo_dist"):
        APOLLO(model, rank=4, exclude=r"excluded\.0\.mlp")
    ((level, line),) = lines(caplog)
    assert level == "INFO"
    for name in ("embed.weight", "head.weight", "side.weight", "excluded.*.mlp.weight"):
        assert f"{name}, " in line, line
    assert r"excluded by 'excluded\\.0\\.mlp'" in line


def test_nothing_to_tell_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "apollo_dist"):
        APOLLO(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=4)
    assert not lines(caplog)


def test_what_the_user_marked_raises() -> None:
    model = grouped()
    with pytest.raises(ValueError, match=r"rank 32 is larger than layers.0.k.weight of shape \(16, 64\)"):
        APOLLO([{"params": [("layers.0.k.weight", model.layers[0]["k"].weight)], "rank": 32}])
    optimizer = APOLLO(Net(), rank=4)
    extra = nn.Parameter(torch.ones(2, 64))
    with pytest.raises(ValueError, match="rank 4 is larger than extra"):
        optimizer.add_param_group({"params": [("extra", extra)], "rank": 4})


@pytest.mark.parametrize("way", ["model", "names", "parameters"])
def test_nothing_left_is_an_error_that_says_the_rank(way: str) -> None:
    model = grouped()
    given = {"model": model, "names": model.named_parameters(), "parameters": list(model.parameters())}[way]
    with pytest.raises(ValueError, match=r"no low-rank matrix found in .* rank 65 is larger than .* Use rank <= 64"):
        APOLLO(given, rank=65)


def test_mini_takes_what_has_one_row_but_no_routers() -> None:
    experts = GroupedExperts((8, 16, 16))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": experts, "router": linear(64, 8)})])})
    model.layers[0]["thin"] = linear(64, 2)
    optimizer = APOLLOMini(model)
    assert optimizer.param_groups[0]["param_names"] == ["layers.0.experts.weight", "layers.0.thin.weight"]


def test_embeddings_and_heads_are_low_rank_where_that_is_asked_for():
    """By the model and by names; also an embedding and a head that are one parameter."""
    for tied in (False, True):
        model = Llama(tied=tied)
        more = {"embed_tokens.weight"} if tied else {"embed_tokens.weight", "lm_head.weight"}
        usual, all_of_them = (
            {name for name, _ in param_groups(model, rank=3, embeddings=embeddings)[0]["params"]}
            for embeddings in ("adamw", "low_rank")
        )
        assert all_of_them == usual | more and not usual & more
        for given in (model, list(model.named_parameters())):
            optimizer = APOLLO(given, rank=3, embeddings="low_rank")
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            state = optimizer.state[model.embed_tokens.weight]
            assert state["exp_avg"].shape == (34, 3)
    excluded = APOLLO(Llama(), rank=3, embeddings="low_rank", exclude="lm_head").param_groups[0]["param_names"]
    assert "embed_tokens.weight" in excluded and "lm_head.weight" not in excluded
    with pytest.raises(ValueError, match='embeddings must be "adamw" or "low_rank", got \'both\''):
        APOLLO(Llama(), rank=3, embeddings="both")
    with pytest.raises(ValueError, match="embeddings='low_rank' has no effect on groups with a rank"):
        APOLLO(param_groups(Llama(), rank=3), embeddings="low_rank")
