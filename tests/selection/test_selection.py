"""Which matrices are low-rank by the structure of models that people write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apollo_dist.selection import by_name
from apollo_dist.selection.choice import of_model

from .models import BLOCKS, Block, GroupedExperts, Net, Stack, chosen, left, linear

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


class StackByProduct(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class StackOfHeads(Stack):
    """As XLNet's attention: one linear map, its outputs in heads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,dhe->bhe", x, self.weight)


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
