"""What a plan is asked for: the engine, the machines, the precision. Frozen, and checked when made."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Engine -> how it divides parameters, in the words of ``apollo_dist.planning.estimate``.
ENGINES = {
    "ddp": "whole",
    "zero0": "whole",
    "zero1": "zero",
    "zero2": "zero",
    "zero3": "zero3",
    "fsdp1": "fsdp1",
    "fsdp2": "fsdp2",
    "hsdp": "fsdp2",
}
PRECISIONS = ("fp32", "bf16", "bf16-pure")
OFFLOADS = ("none", "optimizer", "all")
ATTENTIONS = ("sdpa", "flash_attention_2", "eager")
WEIGHTS = ("int8",)
CHECKPOINTING = ("none", "full", "selective")
LOSSES = ("plain", "chunked", "liger")
_UNITS: dict[str, int] = {unit: 10 ** (3 * i) for i, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_UNITS |= {unit: 2 ** (10 * i) for i, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)}


def parse_bytes(text: str) -> int:
    """Bytes in ``text``: a number and a unit, such as 80GB (80e9) or 80GiB (80 * 2**30).

    Raises:
        ValueError: if it is not understood; the message names the nearest that is.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    known = {unit.lower(): size for unit, size in _UNITS.items()}
    if found and found[2].lower() in known and float(found[1]) > 0:
        return round(float(found[1]) * known[found[2].lower()])
    number = (re.search(r"[0-9]+(?:\.[0-9]+)?", text) or ["80"])[0]
    unit = "".join(re.findall("[A-Za-z]+", text)) or "GB"
    near = (difflib.get_close_matches(unit.lower(), known, n=1, cutoff=0.0) or ["gb"])[0]
    near = next(written for written in _UNITS if written.lower() == near)
    raise ValueError(f"memory {text!r} is not understood; did you mean {number}{near}? Units: {', '.join(_UNITS)}")


def one_of(choices: Sequence[str], key: str, value: str) -> None:
    """Raise ValueError, with the nearest choice, unless ``value`` is one of ``choices``."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown {key} {value!r}{hint} There are {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is to be trained.

    Attributes:
        engine: a key of ``ENGINES``.
        world: data-parallel ranks.
        gpus_per_node: of them on one machine.
        shard_size: for "hsdp", the ranks that divide the model; by default those of one machine.
        gpu_memory: bytes of one device.
        reserve: bytes of it for what is not counted: the CUDA context, NCCL's buffers, fragmentation, the step's
            temporaries of single matrices.
        precision: "fp32"; "bf16", as the trainer means it (DDP: autocast over fp32 weights; FSDP: bf16 compute over
            fp32 shards; ZeRO: bf16 weights and fp32 masters); or "bf16-pure", bf16 weights without masters.
        weights: "int8" for the blocks' linear layers in INT8 with one scale a row; None: all as the precision says.
        gradient_dtype: "fp32" or "bf16", of the gradients that ZeRO keeps; by default the weights' dtype, which
            other engines cannot change.
        rank: r of APOLLO's projections.
        scale_type: APOLLO's scaling, "channel" or "tensor".
        adam_dtype: of the moments of what takes AdamW: "bfloat16", "float32" or None, which is "float32".
        sequence_length: tokens of a sequence.
        micro_batch: sequences of a forward pass.
        attention: "sdpa" (flash or memory-efficient kernels), "flash_attention_2" or "eager".
        checkpointing: what of decoder layers is recomputed in the backward pass: "none", "full" or "selective" (all but
            matrix products and attention).
        loss: "plain", "chunked" with ``loss_chunk`` tokens at a time, or "liger", which chooses them itself.
        offload: "optimizer" (ZeRO: masters and states in host memory) or "all" (ZeRO-3, FSDP: the parameters too).
        layerwise: whether every matrix is updated inside the backward pass, so that one gradient at a time is kept.
        bucket_view: DDP's ``gradient_as_bucket_view``, which the trainer has; without it gradients exist twice.
        bucket_elements: ZeRO's ``reduce_bucket_size``.
        max_live: ZeRO-3's ``stage3_max_live_parameters``.
        sub_group_size: ZeRO-3's option of that name.
    """

    engine: str = "zero3"
    world: int = 8
    gpus_per_node: int = 8
    shard_size: int | None = None
    gpu_memory: int = 80 * 10**9
    reserve: int = 2 * 10**9
    precision: str = "bf16"
    weights: str | None = None
    gradient_dtype: str | None = None
    rank: int = 256
    scale_type: str = "channel"
    adam_dtype: str | None = None
    sequence_length: int = 256
    micro_batch: int = 1
    attention: str = "sdpa"
    checkpointing: str = "none"
    loss: str = "plain"
    loss_chunk: int = 1024
    offload: str = "none"
    layerwise: bool = False
    bucket_view: bool = True
    bucket_elements: int = 50_000_000
    max_live: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000

    def __post_init__(self) -> None:
        one_of(tuple(ENGINES), "engine", self.engine)
        one_of(PRECISIONS, "precision", self.precision)
        one_of(OFFLOADS, "offload", self.offload)
        one_of(ATTENTIONS, "attention", self.attention)
        one_of(CHECKPOINTING, "checkpointing", self.checkpointing)
        one_of(LOSSES, "loss", self.loss)
        one_of(("channel", "tensor"), "scale type", self.scale_type)
        if self.weights is not None:
            self._check_weights()
        if self.adam_dtype is not None:
            one_of(("float32", "bfloat16"), "adam dtype", self.adam_dtype)
        if self.gradient_dtype is not None:
            one_of(("fp32", "bf16"), "gradient dtype", self.gradient_dtype)
        for key in ("world", "gpus_per_node", "rank", "sequence_length", "micro_batch", "loss_chunk", "gpu_memory"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.reserve < 0 or self.reserve >= self.gpu_memory:
            raise ValueError(f"reserve must be less than the GPU's {self.gpu_memory} bytes, got {self.reserve}")
        if self.world > self.gpus_per_node and self.world % self.gpus_per_node:
            nearest = max(1, round(self.world / self.gpus_per_node)) * self.gpus_per_node
            raise ValueError(
                f"world {self.world} is not a multiple of gpus_per_node {self.gpus_per_node}; the nearest is {nearest}"
            )
        self._check_shards()
        self._check_engine()

    def _check_shards(self) -> None:
        if self.shard_size is not None and self.engine != "hsdp":
            raise ValueError(f"shard_size is for engine hsdp, which divides within a node; got engine {self.engine!r}")
        if self.engine == "hsdp" and (self.shards < 1 or self.world % self.shards):
            raise ValueError(f"world {self.world} is not a multiple of shard_size {self.shards}")

    def _check_weights(self) -> None:
        one_of(WEIGHTS, "weights", self.weights or "")
        if self.engine not in ("ddp", "fsdp2", "hsdp") or self.precision == "bf16":
            raise ValueError(
                f"weights {self.weights}: they train in bf16-pure or fp32, in one process, DDP or FSDP2; got engine "
                f"{self.engine} and precision {self.precision}"
            )

    def _check_engine(self) -> None:
        zero, fsdp = self.engine in ("zero1", "zero2", "zero3"), self.engine in ("fsdp1", "fsdp2", "hsdp")
        if self.precision == "bf16-pure" and self.engine.startswith("zero"):
            raise ValueError("precision bf16-pure: DeepSpeed keeps fp32 masters; use bf16, or engine ddp or fsdp2")
        if self.gradient_dtype is not None and not zero:
            raise ValueError(
                f"gradient_dtype {self.gradient_dtype!r}: only ZeRO-1 to 3 can keep gradients in another dtype than "
                f"the weights (data_types.grad_accum_dtype); under {self.engine} it follows from the precision"
            )
        if self.offload == "optimizer" and not zero:
            raise ValueError(f"offload optimizer is ZeRO-1 to 3's; got engine {self.engine!r} (fsdp: offload all)")
        if self.offload == "all" and not (fsdp or self.engine == "zero3"):
            raise ValueError(f"offload all needs zero3, fsdp1, fsdp2 or hsdp; got engine {self.engine!r}")
        if self.layerwise and not (self.engine in ("fsdp2", "hsdp") or (self.engine == "ddp" and self.world == 1)):
            raise ValueError(
                "layerwise: DDP, FSDP1 and ZeRO have not reduced a gradient yet when it is ready in the backward "
                f"pass, so an update there would not be exact; use fsdp2 or one process, not {self.engine} on "
                f"{self.world} ranks"
            )
        if not self.bucket_view and self.engine != "ddp":
            raise ValueError(f"bucket_view is an option of DDP alone; got engine {self.engine!r}")

    @property
    def layout(self) -> str:
        """How parameters are divided, in the words of ``apollo_dist.planning.estimate``."""
        return ENGINES[self.engine]

    @property
    def shards(self) -> int:
        """How many ranks divide a parameter among themselves."""
        if self.layout == "whole":
            return 1
        if self.engine == "hsdp":
            return min(self.gpus_per_node, self.world) if self.shard_size is None else self.shard_size
        return self.world

    @property
    def weight_bytes(self) -> int:
        """Bytes of one stored weight."""
        if self.precision == "bf16":
            return 2 if self.engine.startswith("zero") else 4
        return 4 if self.precision == "fp32" else 2

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in a forward pass."""
        return 4 if self.precision == "fp32" else 2

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one number of a gradient that is kept until the step."""
        if self.gradient_dtype is None:
            return self.weight_bytes
        return 4 if self.gradient_dtype == "fp32" else 2

    @property
    def has_masters(self) -> bool:
        """Whether the engine updates an fp32 copy of the weights: ZeRO-1 to 3 always have one, ZeRO-0 in bf16."""
        return self.engine in ("zero1", "zero2", "zero3") or (self.engine == "zero0" and self.weight_bytes == 2)
