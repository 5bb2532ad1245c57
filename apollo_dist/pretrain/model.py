"""The LLaMA of a run."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.placing import place_whole

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import ModelConfig


def build_model(config: ModelConfig, sequence_length: int, seed: int) -> nn.Module:
    """A ``LlamaForCausalLM`` in fp32 on the CPU, with the initial weights that every engine gives it."""
    model = deferred_model(config, sequence_length)
    return place_whole(model, InitialWeights(model, seed, config.init_std), torch.device("cpu"))


def deferred_model(config: ModelConfig, sequence_length: int, attention: str = "sdpa") -> nn.Module:
    """A ``LlamaForCausalLM`` whose parameters are on the meta device, in fp32: names and shapes without memory.

    Buffers are real, and on the CPU. An engine makes the weights after it has sharded them (``placing.py``).
    """
    from transformers import LlamaConfig  # an optional dependency, slow to import

    from apollo_dist.pretrain.llama import Head, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=sequence_length,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attention,
    )
    # The generator's state is put back: a meta model draws nothing, but seeds it.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Any = LlamaForCausalLM(shape)
        model.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
    # The only module with buffers. They are functions of the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=shape)
    made: nn.Module = model
    return made


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    layers = model.get_submodule("model.layers")
    return list(layers.children())


def model_facts(model: nn.Module) -> dict[str, object]:
    """What all ranks must share, and a run that resumes one: the number of parameters, a digest of names and shapes."""
    described = "\n".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter names and shapes": hashlib.sha256(described.encode()).hexdigest()[:16],
    }
