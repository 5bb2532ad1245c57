"""Model FLOPs utilization (MFU): the share of a device's arithmetic that goes into the model.

After Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022), appendix B::

    FLOPs of a token = 6 N + 12 L h s
    MFU = FLOPs of a token x tokens/s / (ranks x peak FLOPs/s of a device)

N counts the elements of all matrices but the embedding, which is looked up; L layers of width h attend over s tokens,
each counted whole though the mask hides half. Recomputed activations are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from apollo_dist.pretrain.config import Config, ModelConfig

# Dense bf16 FLOPs/s by NVIDIA's data sheets, by what the device's name contains; the first that fits.
PEAK_BF16 = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "A10": 125e12,
}


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a token's forward and backward pass."""
    hidden, kv = model.hidden_size, model.hidden_size * model.kv_heads // model.num_heads
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * model.intermediate_size
    matrices = model.num_layers * layer + hidden * model.vocab_size
    return 6 * matrices + 12 * model.num_layers * hidden * sequence_length


def peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOPs/s of the device: ``peak_tflops``, or by its name in bf16; None where it is not known."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda" or config.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def utilization(config: Config, tokens_per_s: float, ranks: int, peak: float | None) -> float | None:
    """MFU of a run at ``tokens_per_s`` over all ranks; None where the peak is not known."""
    if peak is None:
        return None
    return flops_per_token(config.model, config.sequence_length) * tokens_per_s / (ranks * peak)
