"""DeepSpeed configurations under which APOLLO cannot be exact, or is never called, and what to write instead.

Judged by the JSON alone, so that ``python -m apollo_dist lint`` needs no ranks; the optimizer asks the same question of
the engine that drives it. Verified on DeepSpeed 0.19.8; faults of other versions are in ``faults.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .faults import installed, known_faults

Config = Mapping[str, Any]

_FLOAT16 = ("float16", "torch.float16", "fp16", "half", "torch.half")
_FLOAT32 = ("float32", "torch.float32", "fp32", "float", "torch.float")


def unsupported(config: Config, version: str | None = None) -> list[str]:
    """Why a DeepSpeed configuration is refused.

    Args:
        config: the configuration as a dictionary. Values that are still "auto" pass.
        version: the DeepSpeed version whose own faults count as well; None: the installed one's, if there is one.

    Returns:
        One line for each finding, ``key: reason; remedy``; empty if there is none.
    """
    zero = _section(config, "zero_optimization")
    return [
        *_stage(config, zero),
        *_offload(config, zero),
        *_precision(config),
        *_parallel(config),
        *_universal(config),
        *known_faults(config, version or installed()),
    ]


def _section(config: Config, key: str) -> Config:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _on(value: Any) -> bool:
    """Whether a switch is on; "auto" and the like are not known yet, and pass."""
    return value is True


def _stage(config: Config, zero: Config) -> Iterator[str]:
    if _on(zero.get("elastic_checkpoint")):
        yield (
            "zero_optimization.elastic_checkpoint: its checkpoints hold the states of Adam alone, so that APOLLO's "
            "would be lost without a word; remove it"
        )
    if zero.get("zenflow") not in (None, False, "auto"):
        yield (
            "zero_optimization.zenflow: it updates the largest gradients with an AdamW of its own, beside the "
            "optimizer; remove it"
        )
    autocast = _section(config, "torch_autocast")
    half = str(autocast.get("dtype", "")).lower() in _FLOAT16
    if _on(autocast.get("enabled")) and half and zero.get("compute_grad_norm") is False:
        yield (
            "zero_optimization.compute_grad_norm: without the norm torch_autocast in fp16 decides on each rank alone "
            "whether to step, and a rank that steps waits forever for one that does not; remove it, or autocast to "
            "bfloat16"
        )


def _offload(config: Config, zero: Config) -> Iterator[str]:
    key = "zero_optimization.offload_optimizer"
    offload = _section(zero, "offload_optimizer")
    if offload.get("device", "none") in ("none", "auto"):
        return
    if _on(offload.get("super_offload")):
        yield f"{key}.super_offload: it runs DeepSpeedCPUAdam in a process of its own, never the optimizer; remove it"
    ratio = offload.get("ratio", 1.0)
    if isinstance(ratio, (int, float)) and ratio < 1.0:
        yield f"{key}.ratio: what is not offloaded ({ratio} is) takes AdamW instead of the optimizer; write 1.0"
    low = any(_on(_section(config, name).get("enabled")) for name in ("bf16", "bfloat16", "fp16"))
    sums = str(_section(config, "data_types").get("grad_accum_dtype", "")).lower()
    if low and sums in _FLOAT32 and zero.get("stage") in (1, 2):
        yield (
            "data_types.grad_accum_dtype: with fp32 here, offload_optimizer and stage 1 or 2, DeepSpeed never clears "
            "a gradient that was not finite, and skips every step after it; remove it, or use stage 3"
        )


def _precision(config: Config) -> Iterator[str]:
    if _on(_section(config, "fp16").get("fp16_master_weights_and_grads")):
        yield "fp16.fp16_master_weights_and_grads: DeepSpeed does this with DeepSpeedCPUAdam only; remove it"
    for name in ("bf16", "bfloat16"):
        section = _section(config, name)
        if _on(section.get("bf16_master_weights_and_grads")) and not _on(section.get("bf16_optimizer_states")):
            yield (
                f"{name}.bf16_master_weights_and_grads: DeepSpeed does this with DeepSpeedCPUAdam only, unless "
                "bf16_optimizer_states is true as well; remove it"
            )


def _universal(config: Config) -> Iterator[str]:
    if _on(_section(config, "checkpoint").get("load_universal")):
        yield (
            "checkpoint.load_universal: universal checkpoints hold two moments in the shape of each parameter, and "
            "APOLLO's have other shapes, so that ds_to_universal cannot convert its checkpoints, nor can it continue "
            "from others'; remove it, and use apollo_dist.checkpoint, which any stage and number of ranks can load"
        )


def _parallel(config: Config) -> Iterator[str]:
    for section, key, what in (
        ("tensor_parallel", "autotp_size", "each rank would hold a slice of a matrix and take it for the whole"),
        ("expert_parallel", "autoep_size", "ranks would hold different experts under the same names"),
    ):
        size = _section(config, section).get(key, 1)
        if isinstance(size, int) and size > 1 and _section(config, section).get("enabled") is not False:
            yield f"{section}.{key}: {what}, so the update would not be that of one process; write 1"
