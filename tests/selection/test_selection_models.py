"""The choice of matrices for models that people train, on the meta device, against tables that were written by hand.

A table lists every parameter with at least two dimensions, numbers as ``*``: what is low-rank and what AdamW takes at
rank 256. Everything else has fewer dimensions, and AdamW takes it. All ways to build an optimizer choose the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, param_groups
from apollo_dist.__main__ import main
from apollo_dist.selection.choice import low_rank_names, of_model
from apollo_dist.sharding.names import pattern_of

transformers = pytest.importorskip("transformers")

RANK = 256


def hugging_face(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers with the default sizes of its configuration, but two layers."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


class TimmBlock(nn.Module):
    """A block with the names of timm's ``vision_transformer.Block``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})


class TimmTransformer(nn.Module):
    """A vision transformer with timm's names."""

    def __init__(self, dim: int = 768) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, 16)})
        self.blocks = nn.Sequential(TimmBlock(dim), TimmBlock(dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1000)


class LoRA(nn.Module):
    """A frozen linear map with the names of peft's ``lora.Linear``."""

    def __init__(self, base: nn.Linear, inner: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, inner, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(inner, base.out_features, bias=False)})


def with_lora(inner: int) -> nn.Module:
    model = hugging_face("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=2)()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj, inner)
    return model


def torch_encoder() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
        return nn.ModuleDict({"embed": nn.Embedding(1000, 512), "encoder": nn.TransformerEncoder(layer, 2)})


def each(prefix: str, *names: str) -> set[str]:
    """``prefix`` and each name, with ".weight" at the end."""
    return {f"{prefix}.{name}.weight" for name in names}


ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA = each("model.layers.*", *ATTENTION, *GATED)
ENDS = {"model.embed_tokens.weight", "lm_head.weight"}
BERT = each(
    "bert.encoder.layer.*", "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
BERT_TABLES = each("bert.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings")
OUT_ATTENTION = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
CROSS = [f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")]
T5_BLOCK = [
    *(f"layer.*.SelfAttention.{part}" for part in "qkvo"),
    "layer.*.DenseReluDense.wi",
    "layer.*.DenseReluDense.wo",
]
T5_BIAS = "layer.*.SelfAttention.relative_attention_bias"
EXPERTS = {"model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"}
TWO = {"num_hidden_layers": 2}

# Name: (how it is made, low-rank, AdamW).
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "LLaMA": (hugging_face("LlamaConfig", "LlamaForCausalLM", **TWO), LLAMA, ENDS),
    "Qwen2": (hugging_face("Qwen2Config", "Qwen2ForCausalLM", **TWO), LLAMA, ENDS),
    # Two grouped heads of 64 are fewer numbers than the rank.
    "Qwen2, small": (
        hugging_face(
            "Qwen2Config", "Qwen2ForCausalLM", hidden_size=896, intermediate_size=4864, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, **TWO,
        ),
        LLAMA - each("model.layers.*.self_attn", "k_proj", "v_proj"),
        each("model.layers.*.self_attn", "k_proj", "v_proj") | {"model.embed_tokens.weight"},
    ),
    "Qwen2-MoE": (
        hugging_face("Qwen2MoeConfig", "Qwen2MoeForCausalLM", **TWO),
        each("model.layers.*", *ATTENTION)
        | EXPERTS
        | each("model.layers.*.mlp.shared_expert", "gate_proj", "up_proj", "down_proj"),
        each("model.layers.*.mlp", "gate", "shared_expert_gate") | ENDS,
    ),
    "Mixtral": (
        hugging_face("MixtralConfig", "MixtralForCausalLM", **TWO),
        each("model.layers.*", *ATTENTION) | EXPERTS,
        each("model.layers.*.mlp", "gate") | ENDS,
    ),
    # Its router has 128 rows, and stacks of biases are no matrices.
    "GPT-OSS": (
        hugging_face("GptOssConfig", "GptOssForCausalLM", **TWO),
        each("model.layers.*", *ATTENTION) | EXPERTS,
        each("model.layers.*.mlp", "router") | {f"{name}_bias" for name in EXPERTS} | ENDS,
    ),
    # Its router has 256 rows, so the rank alone does not keep it from being low-rank.
    "DeepSeek-V3": (
        hugging_face("DeepseekV3Config", "DeepseekV3ForCausalLM", first_k_dense_replace=1, **TWO),
        each("model.layers.*", *GATED)
        | each("model.layers.*.self_attn", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        | EXPERTS
        | each("model.layers.*.mlp.shared_experts", "gate_proj", "up_proj", "down_proj"),
        each("model.layers.*.mlp", "gate") | ENDS,
    ),
    "Gemma": (hugging_face("GemmaConfig", "GemmaForCausalLM", **TWO), LLAMA, {"model.embed_tokens.weight"}),
    "Phi": (
        hugging_face("PhiConfig", "PhiForCausalLM", **TWO),
        each("model.layers.*", *(f"self_attn.{part}_proj" for part in "qkv"), "self_attn.dense", "mlp.fc1", "mlp.fc2"),
        ENDS,
    ),
    "GPT-2": (
        hugging_face("GPT2Config", "GPT2LMHeadModel", n_layer=2),
        each("transformer.h.*", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        each("transformer", "wte", "wpe"),
    ),
    "GPT-NeoX": (
        hugging_face("GPTNeoXConfig", "GPTNeoXForCausalLM", **TWO),
        each(
            "gpt_neox.layers.*", "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        {"gpt_neox.embed_in.weight", "lm_head.weight"},
    ),
    "BERT": (
        hugging_face("BertConfig", "BertForMaskedLM", **TWO),
        BERT,
        BERT_TABLES | each("cls.predictions.transform", "dense"),
    ),
    "BERT, classifying": (
        hugging_face("BertConfig", "BertForSequenceClassification", num_labels=1000, **TWO),
        BERT,
        BERT_TABLES | {"bert.pooler.dense.weight", "classifier.weight"},
    ),
    "T5": (
        hugging_face("T5Config", "T5ForConditionalGeneration", num_layers=2),
        each("encoder.block.*", *T5_BLOCK)
        | each("decoder.block.*", *T5_BLOCK, *(f"layer.*.EncDecAttention.{part}" for part in "qkvo")),
        each("encoder.block.*", T5_BIAS) | each("decoder.block.*", T5_BIAS) | {"shared.weight"},
    ),
    "ViT": (
        hugging_face("ViTConfig", "ViTForImageClassification", num_labels=1000, **TWO),
        each("vit.layers.*", *(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2"),
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
        | {"vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"},
    ),
    "CLIP": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TWO, vision_config=TWO)),
        each("text_model.encoder.layers.*", *OUT_ATTENTION, "mlp.fc1", "mlp.fc2")
        | each("vision_model.encoder.layers.*", *OUT_ATTENTION, "mlp.fc1", "mlp.fc2"),
        each("text_model.embeddings", "token_embedding", "position_embedding")
        | each("vision_model.embeddings", "patch_embedding", "position_embedding")
        | {"visual_projection.weight", "text_projection.weight"},
    ),
    "Whisper": (
        hugging_face("WhisperConfig", "WhisperForConditionalGeneration", encoder_layers=2, decoder_layers=2),
        each("model.encoder.layers.*", *OUT_ATTENTION, "fc1", "fc2")
        | each("model.decoder.layers.*", *OUT_ATTENTION, *CROSS, "fc1", "fc2"),
        each("model.encoder", "conv1", "conv2", "embed_positions")
        | each("model.decoder", "embed_tokens", "embed_positions"),
    ),
    "Mamba": (
        hugging_face("MambaConfig", "MambaForCausalLM", **TWO),
        each("backbone.layers.*.mixer", "in_proj", "out_proj"),
        each("backbone.layers.*.mixer", "x_proj", "dt_proj", "conv1d")
        | {"backbone.layers.*.mixer.A_log", "backbone.embeddings.weight"},
    ),
    "nn.TransformerEncoder": (
        torch_encoder,
        each("encoder.layers.*", "self_attn.out_proj", "linear1", "linear2")
        | {"encoder.layers.*.self_attn.in_proj_weight"},
        {"embed.weight"},
    ),
    "timm": (
        TimmTransformer,
        each("blocks.*", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"},
    ),
    # Its inner dimension takes the rank; everything else is frozen, and would be chosen as in LLaMA.
    "LoRA": (
        lambda: with_lora(inner=RANK),
        (LLAMA - each("model.layers.*.self_attn", "q_proj"))
        | each("model.layers.*.self_attn.q_proj", "base_layer", "lora_A.default", "lora_B.default"),
        ENDS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, set[str], set[str]]:
    make, low_rank, adamw = MODELS[request.param]
    with torch.device("meta"):
        return make(), low_rank, adamw


def test_the_table(case: tuple[nn.Module, set[str], set[str]]) -> None:
    model, low_rank, adamw = case
    choice = of_model(model, RANK)
    matrices = {name: chosen for name, chosen in choice.items() if len(chosen.verdict.shape) > 1}
    assert {pattern_of(name) for name in low_rank_names(choice)} == low_rank
    assert {pattern_of(name) for name, chosen in matrices.items() if not chosen.low_rank} == adamw
    assert choice.keys() == {name for name, _ in model.named_parameters()}


def test_every_way_to_build_an_optimizer_chooses_the_same(case: tuple[nn.Module, set[str], set[str]]) -> None:
    model, _, _ = case
    wanted = low_rank_names(of_model(model, RANK)) & {n for n, p in model.named_parameters() if p.requires_grad}
    built = {
        "model": APOLLO(model, rank=RANK),
        "names and model": APOLLO(model.named_parameters(), rank=RANK, model=model),
        "parameters and model": APOLLO(model.parameters(), rank=RANK, model=model),
        "groups": APOLLO(param_groups(model, rank=RANK)),
        # As the Trainer and DeepSpeed do: bare parameters in groups of their own, and the model is known later.
        "attached": APOLLO([{"params": [p]} for p in model.parameters()], rank=RANK),
    }
    built["attached"].attach(model)
    for way, optimizer in built.items():
        (plan,) = optimizer.prepare()
        found = {m.shard.name for group_step in plan.shard_groups for m in group_step.matrices}
        assert {n for n in found if not is_frozen(model, n)} == wanted, way


def is_frozen(model: nn.Module, name: str) -> bool:
    return not model.get_parameter(name).requires_grad


def test_lora_smaller_than_the_rank_is_an_error_that_says_the_rank() -> None:
    with torch.device("meta"):
        model = with_lora(inner=8)
    with pytest.raises(ValueError, match=r"rank 256 is larger than .*lora_A.* Use rank <= 8"):
        APOLLO(model)
    (low, *_) = param_groups(model, rank=8)
    assert {pattern_of(name) for name, p in low["params"] if p.requires_grad} == each(
        "model.layers.*.self_attn.q_proj", "lora_A.default", "lora_B.default"
    )


# The command.


def test_choose_reads_configurations_and_model_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.BertConfig(architectures=["BertForSequenceClassification"], num_labels=7, **TWO).save_pretrained(
        "bert"
    )
    for source in ("bert", "bert/config.json"):  # the folder comes before the model type of that name
        assert main(["choose", source, "--exclude", "intermediate"]) == 0
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["classifier.weight", "7", "x", "768", "AdamW"] in [row[:5] for row in table]
        assert ["bert.encoder.layer.*.intermediate.dense.weight", "(2)", "3072", "x", "768", "AdamW"] in [
            row[:6] for row in table
        ]
        assert table[-1][:7] == ["10", "of", str(table_size(table)), "parameters", "are", "low-rank,", "24.4"]
    assert main(["choose", "gpt2", "--every"]) == 0
    printed = capsys.readouterr().out
    assert "\ntransformer.h.11.mlp.c_fc.weight " in printed
    assert main(["choose", "bert", "--model-class", "BertModel"]) == 0
    assert "\nencoder.layer.*.output.dense.weight (2) " in capsys.readouterr().out


def table_size(table: list[list[str]]) -> int:
    return sum(int(row[1].strip("()")) if row[1].startswith("(") else 1 for row in table[1:-1])


def test_choose_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choose", "llama", "--rank", "5000"]) == 1
    assert "rank 5000 is larger than model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().err
    for arguments, message in (
        (["no_such_model"], "no_such_model is no path of a configuration, no model type of transformers"),
        (["llama", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["llama", "--exclude", "("], "exclude='(' is not a regular expression"),
        (["llama", "--model-class", "NoSuchClass"], "has no class NoSuchClass"),
    ):
        assert main(["choose", *arguments]) == 2
        assert message in capsys.readouterr().err
