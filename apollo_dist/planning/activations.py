"""What a LLaMA keeps between its forward and its backward pass, by formula.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (MLSys 2023), section 4: count
the tensors that autograd saves, layer by layer. Their s b h (34 + 5 a s / h) bytes are for a GPT with GELU, LayerNorm
and dropout; counted here is ``transformers``' LLaMA, whose RMSNorm works in fp32, and whose SwiGLU saves four tensors
as wide as the MLP. ``tests/planning/test_planner_activations.py`` compares with what autograd saves.

Per token and layer, with widths h, kv (of keys and values) and f, a heads, c the bytes of a computed number::

    norms, 2 x  | fp32 input 4 h and root 4, normalized c h, output c h
    attention   | q, k, v, output: c (2 h + 2 kv), the softmax's fp32 sums 4 a       (sdpa)
                | and a s fp32 probabilities, once more in c where c is not 4, ...   (eager, no flash kernel)
    MLP         | gate, its activation, up, their product: 4 c f
"""

from __future__ import annotations

from dataclasses import dataclass

from ..pretrain.config import ModelConfig


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        saved: what autograd keeps at the end of the forward pass.
        recomputed: with checkpointing, what one layer's recomputation adds in the backward pass; else 0.
        loss: what the loss's backward pass needs beyond: the logits in the compute dtype and their gradient in fp32.
    """

    saved: int
    recomputed: int
    loss: int

    @property
    def peak(self) -> int:
        """The most there is at a time: at the loss, or in the first layer's recomputation."""
        return self.saved + max(self.recomputed, self.loss)


def activations(
    model: ModelConfig,
    *,
    micro_batch: int,
    sequence_length: int,
    compute_bytes: int,
    autocast: bool = False,
    attention: str = "sdpa",
    checkpointing: bool = False,
) -> Activations:
    """Activations of ``LlamaForCausalLM`` with cross-entropy over fp32 logits.

    Args:
        model: its shape.
        micro_batch, sequence_length: tokens of a forward pass.
        compute_bytes: 4 or 2, of a computed number.
        autocast: whether bf16 comes from autocast over fp32 weights, where the residual stream and the norms' outputs
            are fp32 and every product keeps its own bf16 copy of its input.
        attention: "sdpa" or "eager".
        checkpointing: whether each decoder layer is recomputed.
    """
    tokens = micro_batch * sequence_length
    layer = _layer(model, sequence_length, compute_bytes, autocast, attention)
    residual = 4 if autocast else compute_bytes
    stack = model.num_layers * (residual * model.hidden_size if checkpointing else layer)
    # The last norm, then log-probabilities in fp32; token ids and targets are int64, cosines and sines few.
    head = _norm(model.hidden_size, compute_bytes, autocast, products=1) + 4 * model.vocab_size + 2 * 8
    logits = 4 * model.vocab_size + (compute_bytes * model.vocab_size if compute_bytes < 4 else 0)
    return Activations(
        saved=tokens * (stack + head),
        recomputed=tokens * layer if checkpointing else 0,
        loss=tokens * logits,
    )


def _norm(width: int, compute: int, autocast: bool, products: int) -> int:
    """One RMSNorm and the copies of its output that ``products`` matrix products keep, bytes per token."""
    if autocast:
        # The input and the normalized input in fp32; a bf16 copy for every product.
        return 4 + (4 + 4) * width + products * compute * width
    return 4 + (4 + 2 * compute) * width


def _layer(model: ModelConfig, length: int, compute: int, autocast: bool, attention: str) -> int:
    """One decoder layer, bytes per token."""
    heads, hidden, wide = model.num_heads, model.hidden_size, model.intermediate_size
    kv = hidden * model.kv_heads // heads
    norms = _norm(hidden, compute, autocast, products=3) + _norm(hidden, compute, autocast, products=2)
    if attention == "sdpa":
        attended = compute * (2 * hidden + 2 * kv) + 4 * heads
    else:
        attended = compute * (2 * hidden + 2 * hidden) + heads * length * (4 + (compute if compute < 4 else 0))
    return norms + attended + 4 * compute * wide
