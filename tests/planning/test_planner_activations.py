"""The activation formula against what autograd really saves of a small LLaMA, in every precision."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from apollo_dist.planning.activations import activations
from apollo_dist.pretrain.compute import recomputed
from apollo_dist.pretrain.config import ModelConfig
from apollo_dist.pretrain.losses import token_losses
from apollo_dist.pretrain.model import build_model, decoder_layers

ROWS, LENGTH = 4, 32
MODEL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_layers": 3, "num_heads": 4}


@pytest.fixture(autouse=True)
def plain_kernels():
    """bf16 products without oneDNN, which needs instructions that not every CPU has."""
    before = torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(*before)


class Saved:
    """Bytes of the distinct storages that autograd saves, weights aside."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self.storages[storage.data_ptr()] = tensor  # kept, so that its address stays its own
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def measure(config: ModelConfig, precision: str, attention: str, checkpointing: bool) -> tuple[int, int]:
    """Bytes saved at the end of the forward pass, and the most that one layer's recomputation saves."""
    model = build_model(config, LENGTH, 0).train()
    model.config._attn_implementation = attention
    if precision == "bf16-pure":
        model = model.to(torch.bfloat16)
    if checkpointing:
        # The reentrant kind keeps its inputs where hooks see them.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    saved, layer = Saved(model), [Saved(model)]
    tokens = torch.randint(config.vocab_size, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    most = [0]

    def begin(*_: Any) -> None:
        most[0] = max(most[0], layer[0].bytes)
        layer[0] = Saved(model)

    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        loss = token_losses(model(input_ids=tokens[0]).logits, tokens[1]).mean()
    forward = saved.bytes
    for block in decoder_layers(model):
        block.input_layernorm.register_forward_pre_hook(begin)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: layer[0].pack(tensor), lambda tensor: tensor):
        loss.backward()
    begin()
    return forward, most[0]


def autocast_copies(config: ModelConfig) -> int:
    """Bytes of the bf16 copies of the matrices, which the planner counts apart."""
    model = build_model(config, LENGTH, 0)
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_saved_bytes_are_as_the_formula_says(precision: str, attention: str, kv_heads: int) -> None:
    """Within 1 %: what is left is cosines and sines, and indices."""
    config = ModelConfig(**MODEL, num_kv_heads=kv_heads)
    for checkpointing in (False, True):
        predicted = activations(
            config,
            micro_batch=ROWS,
            sequence_length=LENGTH,
            compute_bytes=4 if precision == "fp32" else 2,
            autocast=precision == "bf16",
            attention=attention,
            checkpointing="full" if checkpointing else "none",
        )
        forward, recomputed = measure(config, precision, attention, checkpointing)
        if precision == "bf16":
            copies = autocast_copies(config)
            # Checkpointed layers drop theirs; the planner takes them as kept.
            head = 2 * config.vocab_size * config.hidden_size
            forward -= head if checkpointing else copies
            recomputed -= (copies - head) // config.num_layers if checkpointing else 0
        assert forward == pytest.approx(predicted.saved, rel=0.01), checkpointing
        assert recomputed == pytest.approx(predicted.recomputed, rel=0.01), checkpointing


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
def test_what_the_trainers_own_options_keep(precision: str, attention: str) -> None:
    """Within 2 % of what the allocator has after the forward pass: what checkpointing keeps, hooks do not see."""
    config = ModelConfig(**MODEL, num_kv_heads=2)
    tokens = torch.randint(config.vocab_size, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    for checkpointing, chunk in [("none", None), ("full", None), ("selective", None), ("none", 48), ("selective", 48)]:
        model: Any = build_model(config, LENGTH, 0)
        model.config._attn_implementation = attention
        if precision == "bf16-pure":
            model = model.to(torch.bfloat16)
        model.lm_head.chunk = chunk
        for layer in decoder_layers(model):
            if checkpointing != "none":
                layer.forward = recomputed(layer.forward, checkpointing)
        gc.collect()  # the last model's graph must not go in the middle of this one's
        with (
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            losses = model(tokens[0], targets=tokens[1])
        events = profiler.profiler.kineto_results.events()
        held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        if attention == "eager":  # the mask, which is not an activation
            held -= LENGTH * LENGTH * (2 if precision == "bf16-pure" else 4)
        predicted = activations(
            config,
            micro_batch=ROWS,
            sequence_length=LENGTH,
            compute_bytes=4 if precision == "fp32" else 2,
            autocast=precision == "bf16",
            attention=attention,
            checkpointing=checkpointing,
            loss_chunk=chunk,
        ).saved
        if precision == "bf16":  # the planner counts the copies of the weights apart
            head = 2 * config.vocab_size * config.hidden_size
            # What is recomputed makes its copies again.
            held -= (autocast_copies(config) - head if checkpointing == "none" else 0) + (head if chunk is None else 0)
        assert held == pytest.approx(predicted, rel=0.02), (checkpointing, chunk)
        del losses


def test_activations_grow_linearly_and_checkpointing_saves_most() -> None:
    config = ModelConfig(**MODEL)
    known = {"sequence_length": LENGTH, "compute_bytes": 2}
    one, three = (activations(config, micro_batch=b, **known) for b in (1, 3))
    assert three.peak == 3 * one.peak
    deep = ModelConfig(**{**MODEL, "num_layers": 40})
    assert activations(deep, micro_batch=1, **known, checkpointing="full").peak * 5 < (
        activations(deep, micro_batch=1, **known).peak
    )
