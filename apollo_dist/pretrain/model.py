"""The LLaMA of a run, its initial weights, and its loss."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from apollo_dist.pretrain.config import ModelConfig


def build_model(config: ModelConfig, sequence_length: int, seed: int) -> nn.Module:
    """A ``LlamaForCausalLM`` in fp32 on the CPU; its weights are a function of the arguments alone.

    Every rank builds the whole model, so the weights do not depend on the engine or the number of ranks; the engine
    shards or moves them afterwards.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # an optional dependency, slow to import

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
    )
    torch.manual_seed(seed)
    model: nn.Module = LlamaForCausalLM(shape)
    return model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    layers = model.get_submodule("model.layers")
    return list(layers.children())


def model_facts(model: nn.Module) -> dict[str, object]:
    """What all ranks must share before training: digests of the parameters' names and shapes, and of their values."""
    described = "\n".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters())
    # Integer sums of the bit patterns: exact, so the number of threads that add them does not matter.
    sums = [int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters()]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter names and shapes": hashlib.sha256(described.encode()).hexdigest()[:16],
        "initial weights": hashlib.sha256(repr(sums).encode()).hexdigest()[:16],
    }


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, fp32: logits (b, s, v) and targets (b, s) give (b, s)."""
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)
