"""``LlamaForCausalLM`` that can return losses instead of logits. Importing it imports transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apollo_dist.pretrain.losses import token_losses


class Head(nn.Linear):
    """The output layer, (b, s, h) to logits (b, s, v), or with targets to their losses (b, s) in nats, fp32.

    The losses are made inside of the layer, because FSDP and ZeRO-3 gather its weight for its own forward pass only.

    Attributes:
        chunk: tokens whose logits exist at a time; they are computed again in the backward pass. None: all of them,
            once, and kept.
        fused: hidden states (n, h), the weight and targets (n,) to losses (n,), in the place of ``chunk``.
    """

    chunk: int | None = None
    fused: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """See the class."""
        if targets is None:
            return super().forward(hidden)
        if self.fused is not None:
            return self.fused(hidden.flatten(0, 1), self.weight, targets.flatten()).view_as(targets)
        if self.chunk is None:
            return token_losses(super().forward(hidden), targets)
        rows, wanted = hidden.flatten(0, 1), targets.flatten()
        starts = range(0, len(rows), self.chunk)
        pairs = [(rows[first : first + self.chunk], wanted[first : first + self.chunk]) for first in starts]
        # Without a random state to put back: there is no dropout, and reading it would wait for the device.
        losses = [
            checkpoint(self._losses, *pair, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else self._losses(*pair)
            for pair in pairs
        ]
        return torch.cat(losses).view_as(targets)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_losses(super().forward(hidden), targets)


class LlamaForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]  # untyped
    """Transformers' model; exported configurations name its class, so it keeps the name."""

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, **more: Any) -> Any:
        """Losses (b, s) of targets (b, s) if they are given, else as in transformers."""
        if targets is None:
            return super().forward(input_ids=input_ids, **more)
        losses = self.lm_head(self._hidden(input_ids), targets)
        return losses.clone()  # FSDP2 warns of outputs that are views of others

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """What the head sees, (b, s, h).

        ``LlamaModel``'s own pass asks the device whether the positions are those of packed sequences, and waits for the
        answer. Here they never are.
        """
        inner, length = self.model, input_ids.shape[1]
        hidden: Tensor = inner.embed_tokens(input_ids)
        positions = torch.arange(length, device=hidden.device)[None]
        turned = inner.rotary_emb(hidden, position_ids=positions)
        mask = None  # the fused kernels are causal without one
        if self.config._attn_implementation == "eager":
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.full((1, 1, length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
        for layer in inner.layers:
            found = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=turned)
            hidden = found if isinstance(found, Tensor) else found[0]  # a tuple in older transformers
        last: Tensor = inner.norm(hidden)
        return last
