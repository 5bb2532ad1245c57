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

With full checkpointing a layer keeps its input alone, with selective checkpointing its input and the results of matrix
products and attention. The chunked loss keeps no log-probabilities, and has a chunk's logits at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pretrain.config import ModelConfig


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        saved: what autograd keeps at the end of the forward pass.
        recomputed: with checkpointing, what one layer's recomputation adds in the backward pass; else 0.
        loss: what the loss's backward pass needs beyond: the logits in the compute dtype and their gradient in fp32;
            of the chunked loss of one chunk, with its log-probabilities.
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
    checkpointing: str = "none",
    loss_chunk: int | None = None,
) -> Activations:
    """Activations of ``LlamaForCausalLM`` with cross-entropy over fp32 logits.

    Args:
        model: its shape.
        micro_batch, sequence_length: tokens of a forward pass.
        compute_bytes: 4 or 2, of a computed number.
        autocast: whether bf16 comes from autocast over fp32 weights, where the residual stream and the norms' outputs
            are fp32 and every product keeps its own bf16 copy of its input.
        attention: "sdpa", "flash_attention_2" (which keeps the same) or "eager".
        checkpointing: "none", "full" or "selective": what of each decoder layer is recomputed.
        loss_chunk: tokens whose logits exist at a time; None: all.
    """
    tokens = micro_batch * sequence_length
    layer = _layer(model, sequence_length, compute_bytes, autocast, attention)
    kept, again = layer, 0
    if checkpointing != "none":
        products, both = _products(model, sequence_length, compute_bytes, attention)
        kept = (4 if autocast else compute_bytes) * model.hidden_size
        again = layer
        if checkpointing == "selective":
            kept, again = kept + products, layer - both
    stack = model.num_layers * kept
    # The last norm, then log-probabilities in fp32; token ids and targets are int64, cosines and sines few.
    head = _norm(model.hidden_size, compute_bytes, autocast, products=1) + 2 * 8
    probabilities = 4 * model.vocab_size
    logits = 4 * model.vocab_size + (compute_bytes * model.vocab_size if compute_bytes < 4 else 0)
    if loss_chunk is None:
        head += probabilities
        loss = tokens * logits
    else:
        if autocast:
            head += (4 - compute_bytes) * model.hidden_size  # the head's input as it came, not its bf16 copy
        loss = min(loss_chunk, tokens) * (probabilities + logits)
    return Activations(saved=tokens * (stack + head), recomputed=tokens * again, loss=loss)


def liger_chunk(model: ModelConfig, tokens: int) -> int:
    """Tokens whose logits Liger-Kernel has at a time: so many that they are about as large as the head's input."""
    return 1 << (math.ceil(tokens / math.ceil(model.vocab_size / model.hidden_size)) - 1).bit_length()


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
    if attention != "eager":
        attended = compute * (2 * hidden + 2 * kv) + 4 * heads
    else:
        attended = compute * (2 * hidden + 2 * hidden) + heads * length * (4 + (compute if compute < 4 else 0))
    return norms + attended + 4 * compute * wide


def _products(model: ModelConfig, length: int, compute: int, attention: str) -> tuple[int, int]:
    """Results of a layer's matrix products and attention, bytes per token: all, and those that autograd saves too."""
    heads, hidden, wide = model.num_heads, model.hidden_size, model.intermediate_size
    kv = hidden * model.kv_heads // heads
    # q, k, v, the attention's result, its product with the output matrix; gate, up, and down's result.
    every = compute * (4 * hidden + 2 * kv + 2 * wide)
    # Autograd saves q and k after their rotation, and repeats v for the eager product.
    both = compute * (hidden + 2 * wide)
    if attention == "eager":
        return every + compute * heads * length, both
    return every + 4 * heads, both + compute * kv + 4 * heads
