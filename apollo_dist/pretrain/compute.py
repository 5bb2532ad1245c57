"""How passes are computed, as options of a run: recomputed activations, compiled layers, the loss in chunks.

None of it changes what is computed but for rounding, nor the names of parameters: ``forward`` of the layers is wrapped,
inside of whatever hooks an engine puts around it, so that a recomputation gathers nothing again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from apollo_dist.pretrain.initial import named_parameters_and_modules
from apollo_dist.pretrain.int8 import quantize_layers
from apollo_dist.pretrain.liger import check_liger, liger_losses
from apollo_dist.pretrain.model import decoder_layers
from apollo_dist.pretrain.placing import materialize

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config

_aten = torch.ops.aten
# What "selective" keeps: results of matrix products and of attention. The rest of a layer is cheap to compute again.
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def check_compute(config: Config, zero_stage: int | None) -> None:
    """Raise ValueError for what cannot run here, before anything is built.

    Args:
        config: of the run.
        zero_stage: DeepSpeed's; None under another engine.
    """
    if config.attention == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available():
            raise ValueError(
                "--attention flash_attention_2 needs a GPU and the package flash-attn: pip install flash-attn, or take "
                "--attention sdpa, which has a flash kernel of its own"
            )
        if config.precision == "fp32":
            raise ValueError("--attention flash_attention_2 has no fp32 kernel: pass --precision bf16")
    if config.loss == "liger":
        check_liger()
    if config.compile and zero_stage == 3:
        raise ValueError(
            "--compile with ZeRO-3: DeepSpeed gathers weights in hooks inside of the layers that would be compiled; "
            "take stage 2, or --engine fsdp2"
        )


def configure_compute(model: nn.Module, config: Config) -> None:
    """Make ``model``, before an engine wraps it, compute as ``config`` says."""
    if config.precision == "bf16-pure":
        for name, parameter, module in list(named_parameters_and_modules(model)):
            # Buffers stay in fp32: the frequencies of the rotary embedding.
            materialize(parameter, module, name, parameter.device, torch.bfloat16)
    if config.weights == "int8":
        quantize_layers(decoder_layers(model))
    head: Any = model.get_submodule("lm_head")
    head.chunk = config.loss_chunk if config.loss == "chunked" else None
    head.fused = liger_losses if config.loss == "liger" else None
    for layer in decoder_layers(model):
        if config.activation_checkpointing != "none":
            layer.forward = recomputed(layer.forward, config.activation_checkpointing)
        if config.compile:
            layer.forward = torch.compile(layer.forward)


def recomputed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """``forward`` that keeps its inputs (and with "selective" `KEPT`), and is computed again in the backward pass."""
    # No random state to put back: there is no dropout, and reading it would wait for the device.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(KEPT))

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return wrapped
