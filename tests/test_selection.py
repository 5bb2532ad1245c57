"""Which matrices are low-rank: by the structure of models that people write, by names, and told in the log."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import apollo_dist
from apollo_dist import APOLLO, APOLLOMini, param_groups
from apollo_dist.selection import by_name
from apollo_dist.selection.choice import low_rank_names, of_model


def linear(n: int = 64, m: int | None = None) -> nn.Linear:
    return nn.Linear(n, m or n, bias=False)


def chosen(model: nn.Module, rank: int = 4, **options) -> set[str]:
    return low_rank_names(of_model(model, rank, **options))


def left(model: nn.Module, rank: int = 4) -> set[str]:
    """The matrices that AdamW takes."""
    return {name for name, one in of_model(model, rank).items() if not one.low_rank and len(one.verdict.shape) > 1}


def stepped(optimizer: APOLLO) -> set[str]:
    """The low-rank matrices of an optimizer after a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return {name for name, slot in optimizer.named_state().items() if "last_norm" in slot}


class Block(nn.Module):
    """Attention and MLP under names that a test chooses."""

    def __init__(self, attention: str = "self_attn") -> None:
        super().__init__()
        self.add_module(attention, nn.ModuleDict({part: linear() for part in "qkvo"}))
        self.mlp = linear()


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None, **more: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        for name, module in more.items():
            self.add_module(name, module)
        self.head = head or linear(64, 100)


BLOCKS = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in (*(f"self_attn.{p}" for p in "qkvo"), "mlp")}


# Structure.


@pytest.mark.parametrize(
    "name", ["self_attn", "multi_head_attention", "multi_head_attn", "cross_head_mixer", "embed_mixer"]
)
def test_words_inside_of_names_decide_nothing(name: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(name)])})
    assert chosen(model) == {f"layers.0.{name}.{part}.weight" for part in "qkvo"} | {"layers.0.mlp.weight"}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n for n, verdict in by_name.judge(shapes).items() if verdict.candidate} == chosen(model)


def test_names_say_nothing_about_linear_maps_in_blocks() -> None:
    """Everything here is a linear map in a block, whatever it is called."""
    names = ("vision_embed_tokens", "norm_proj", "header", "wte_mixer", "lm_heading", "router_free", "head")
    block = nn.ModuleDict({name: linear() for name in names})
    assert chosen(nn.ModuleDict({"layers": nn.ModuleList([block])})) == {f"layers.0.{name}.weight" for name in names}


class Heads(nn.Module):
    """Attention as tutorials write it: a list of heads inside of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.ModuleDict({part: linear(64, 16) for part in "qkv"}) for _ in range(4)])
        self.proj = linear()


def test_a_list_of_attention_heads_is_no_list_of_output_heads() -> None:
    model = Net(blocks=nn.Sequential(Heads(), Heads()))
    wanted = {f"blocks.{i}.heads.{j}.{part}.weight" for i in (0, 1) for j in range(4) for part in "qkv"}
    assert chosen(model) == BLOCKS | wanted | {"blocks.0.proj.weight", "blocks.1.proj.weight"}


@pytest.mark.parametrize(
    "more",
    [
        {"lm_out_heads": nn.ModuleList([linear(64, 100), linear(64, 100)])},  # several vocabularies
        {"tasks": nn.ModuleList([linear(64, 7), linear(64, 3)])},  # classes, under a name that says nothing
        {"medusa_head": nn.ModuleList([nn.Sequential(nn.ModuleDict({"deep": linear()}), linear(64, 100))])},
        {"head": nn.Sequential(nn.LayerNorm(64), linear(), nn.GELU(), linear(64, 10))},
        {"pooler": nn.Sequential(linear(), nn.Tanh())},
        {"mm_projector": nn.Sequential(linear(32, 64), nn.GELU(), linear())},
    ],
    ids=lambda more: next(iter(more)),
)
def test_linear_maps_that_are_numbered_outside_of_the_blocks(more: dict[str, nn.Module]) -> None:
    allowed = {"medusa_head.0.0.deep.weight"} if "medusa_head" in more else set()
    assert chosen(Net(**more)) == BLOCKS | allowed


def test_the_last_of_a_sequence_of_blocks_is_a_head() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), Block(), Block(), nn.LayerNorm(64), linear(64, 10))
    assert left(model) == {"0.weight", "4.weight"}
    classifier = nn.Sequential(Net(), linear(64, 10))
    assert chosen(classifier) == {f"0.{name}" for name in BLOCKS}


def test_tied_weights_are_embeddings() -> None:
    model = Net()
    model.layers.append(nn.ModuleDict({"out": linear(64, 100), "deep": Block()}))
    model.layers[2]["out"].weight = model.embed.weight
    assert "embed.weight" in left(model)
    assert of_model(model, 4)["embed.weight"].verdict.why == "embedding; tied to layers.2.out.weight"
    # Also where the embedding comes last.
    late = nn.ModuleDict({"layers": nn.ModuleList([Block()]), "table": nn.Embedding(64, 64)})
    late["table"].weight = late.layers[0].mlp.weight
    assert left(late) == {"layers.0.mlp.weight"}
    assert of_model(late, 4)["layers.0.mlp.weight"].verdict.why == "tied to table.weight: embedding"
    # Two linear maps in blocks may share a weight.
    model = Net()
    model.layers[1].mlp.weight = model.layers[0].mlp.weight
    assert chosen(model) == BLOCKS - {"layers.1.mlp.weight"}


def test_a_plain_sequence_of_linear_maps() -> None:
    """Its last one is a head only where something says so."""
    plain = nn.Sequential(linear(), nn.ReLU(), linear(64, 10))
    assert chosen(plain) == {"0.weight", "2.weight"}
    vgg = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(3, 8, 3)), "classifier": plain})
    assert chosen(vgg) == {"classifier.0.weight"}
    plain.num_classes = 10  # type: ignore[assignment]
    assert chosen(plain) == {"0.weight"}


def test_what_is_a_repeated_block() -> None:
    numbered = nn.ModuleDict({"0": Block(), "1": Block()})  # as torchtitan keeps its layers
    named = nn.Sequential()  # as torchvision names them
    for i in range(2):
        named.add_module(f"encoder_layer_{i}", Block())
    pair = nn.Module()
    pair.layer1, pair.layer2, pair.other = Block(), Block(), Block()
    two = nn.Module()  # no blocks: linear maps that are numbered in their names
    two.fc1, two.fc2 = linear(), linear()
    assert len(chosen(nn.ModuleDict({"layers": numbered}))) == 10
    assert len(chosen(nn.ModuleDict({"layers": named}))) == 10
    assert {name.partition(".")[0] for name in chosen(pair)} == {"layer1", "layer2"}
    assert chosen(two) == set()
    assert chosen(nn.ModuleDict({"layers": nn.ModuleList([Block()])})), "one layer is a block too"


class MyLinear(nn.Module):
    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(m, n))


class ByOperator(MyLinear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class ByFunction(MyLinear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return torch.nn.functional.linear(x, weight)


class ByMatmul(MyLinear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.transpose(0, 1))


class ByEinsum(MyLinear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self.weight)


class BySizes(MyLinear):
    """Its code says nothing, but its sizes do, as those of quantized linear maps."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.in_features, self.out_features = n, m


class Inherited(ByOperator):
    pass


class RawLoRA(nn.Linear):
    """As in loralib: two parameters of its own in a subclass of ``nn.Linear``."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, bias=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(8, n)), nn.Parameter(torch.ones(m, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + x @ self.lora_A.T @ self.lora_B.T


class ByIndex(MyLinear):
    def forward(self, index: Tensor) -> Tensor:
        return self.weight[index]


class ByEmbedding(MyLinear):
    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class IndexedProduct(MyLinear):
    """A table whose rows are multiplied with."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x @ self.weight[index].T


class HeadNorm(MyLinear):
    """Gains of several norms, as in Cohere's query norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * self.weight


class Gain(MyLinear):
    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.proj = nn.Parameter(torch.ones(n, m))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight) @ self.proj


@pytest.mark.parametrize(
    ("kind", "low_rank"),
    [
        (ByOperator, {"weight"}), (ByFunction, {"weight"}), (ByMatmul, {"weight"}), (ByEinsum, {"weight"}),
        (BySizes, {"weight"}), (Inherited, {"weight"}), (RawLoRA, {"weight", "lora_A", "lora_B"}),
        (ByIndex, set()), (ByEmbedding, set()), (IndexedProduct, set()), (HeadNorm, set()), (Gain, {"proj"}),
    ],
)  # fmt: skip
def test_classes_of_ones_own(kind: type[nn.Module], low_rank: set[str]) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"own": kind(64, 64), "other": Block()})])})
    assert {name for name in chosen(model) if ".own." in name} == {f"layers.0.own.{leaf}" for leaf in low_rank}


class Stack(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class StackByProduct(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class StackOfHeads(Stack):
    """As XLNet's attention: one linear map, its outputs in heads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,dhe->bhe", x, self.weight)


class GroupedExperts(Stack):
    """Says by its name what it holds."""


def moe(experts: nn.Module, router: nn.Module, **more: nn.Module) -> nn.Module:
    block = nn.ModuleDict({"moe": nn.ModuleDict({"router": router, "experts": experts, **more}), "attention": Block()})
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def test_experts_and_what_routes_to_them() -> None:
    def found(model: nn.Module) -> set[str]:
        return {name.removeprefix("layers.0.moe.") for name in chosen(model, rank=1) if ".moe." in name}

    stack = GroupedExperts((8, 64, 64))
    assert found(moe(stack, linear(64, 8))) == {"experts.weight"}
    assert found(moe(StackByProduct((8, 64, 64)), linear(64, 8), gate=linear(64, 1))) == {"experts.weight"}
    assert found(moe(stack, ByOperator(64, 8))) == {"experts.weight"}
    assert found(moe(stack, nn.Sequential(linear(64, 32), nn.ReLU(), linear(32, 8)))) == {
        "experts.weight", "router.0.weight"
    }  # fmt: skip
    listed = nn.ModuleList([nn.ModuleDict({"up": linear(64, 96), "down": linear(96, 64)}) for _ in range(8)])
    both = {f"experts.{i}.{part}.weight" for i in range(8) for part in ("up", "down")}
    assert found(moe(listed, linear(64, 8))) == both
    # Blocks beside a block of experts do not route to them, whatever they give.
    blocks = nn.ModuleList([GroupedExperts((8, 64, 64)), nn.ModuleDict({"linear": linear(64, 8)})])
    assert chosen(nn.ModuleDict({"layers": blocks}), rank=1) == {"layers.0.weight", "layers.1.linear.weight"}
    # A linear map beside a list of something else is no router.
    assert "layers.0.moe.shared.weight" in chosen(moe(listed, linear(64, 8), shared=linear()))


def test_three_dimensions_that_are_no_stack() -> None:
    for kind, low_rank in ((StackOfHeads, False), (Stack, False), (StackByProduct, True)):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"w": kind((4, 64, 64)), "o": Block()})])})
        assert ("layers.0.w.weight" in chosen(model)) == low_rank, kind


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.ones(49, 8))
        self.proj = linear()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.proj(x) + self.relative_position_bias_table[index]


def test_what_is_no_linear_map() -> None:
    block = nn.ModuleDict(
        {
            "table": nn.Embedding(32, 8), "bag": nn.EmbeddingBag(32, 8), "conv": nn.Conv1d(64, 64, 3),
            "wide": nn.LayerNorm((8, 64)), "rnn": nn.GRU(64, 64), "positions": Positions(), "linear": linear(),
        }
    )  # fmt: skip
    assert chosen(nn.ModuleDict({"layers": nn.ModuleList([block])})) == {
        "layers.0.linear.weight", "layers.0.positions.proj.weight"
    }  # fmt: skip


def test_attention_of_torch() -> None:
    one = nn.MultiheadAttention(64, 4)
    other = nn.MultiheadAttention(64, 4, kdim=32, vdim=16, add_bias_kv=True)
    assert chosen(nn.ModuleDict({"layers": nn.ModuleList([one, other])})) == {
        "layers.0.in_proj_weight", "layers.0.out_proj.weight", "layers.1.out_proj.weight",
        *(f"layers.1.{part}_proj_weight" for part in "qkv"),
    }  # fmt: skip
    assert chosen(nn.ModuleDict({"attention": one})) == set()


def test_wrappers_in_one_process_change_nothing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1].mlp = torch.compile(model.layers[1].mlp)
    assert chosen(model) == BLOCKS
    assert chosen(torch.compile(model)) == BLOCKS


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


def grouped() -> nn.Module:
    """Blocks with a key projection of few rows."""
    block = nn.ModuleDict({"q": linear(), "k": linear(64, 16), "o": linear()})
    return Net(layers=nn.ModuleList([block, copy.deepcopy(block)]))


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
