"""What every rank holds and sends: the layouts' plans, the engines' own buffers, and the activations, put together."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..rules.registry import rules_named
from ..selection.choice import check_any, low_rank_names, of_model
from ..selection.roles import of_model as of_parameters
from .activations import Activations, activations, liger_chunk
from .estimate import Estimate, divide, estimate, estimate_plans, estimate_rule, shard_numel, units
from .fake import meta_model, read_fsdp2
from .options import CHECKPOINTING, Options

if TYPE_CHECKING:
    from ..pretrain.config import ModelConfig

OPTIMIZERS = ("apollo", "apollo-mini", "galore", "fira", "muon", "scale", "adam-mini", "adamw")
RULES = {"galore": "galore", "fira": "fira", "muon": "muon", "scale": "scale", "adam-mini": "adam_mini"}
OF_RANK = ("galore", "fira")
MINI: dict[str, Any] = {"rank": 1, "scale_type": "tensor"}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for; docs/planning.md says how each is derived.

    Attributes:
        weights, gradients, masters, state: kept all the time.
        buckets: in which the engine reduces gradients.
        gathered: parameters that are gathered for use, and gradients that are not yet reduced.
        activations: at their peak.
        step_gradients: the fp32 copy of the gradients that DeepSpeed makes for the step.
        exchange: APOLLO's buffers during the step.
        host: what is offloaded, in host memory; not part of ``total``.
    """

    weights: int
    gradients: int
    masters: int
    state: int
    buckets: int
    gathered: int
    activations: int
    step_gradients: int
    exchange: int
    host: int = 0

    @property
    def kept(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.masters + self.state + self.buckets

    @property
    def total(self) -> int:
        """The peak: forward and backward pass, or the step, whichever needs more; they do not coincide."""
        return self.kept + max(self.gathered + self.activations, self.step_gradients + self.exchange)


@dataclass(frozen=True)
class Forecast:
    """A plan for one model and one set of options.

    Attributes:
        name: of the model.
        parameters: how many the model has.
        options: that it was made for.
        ranks: for each optimizer the memory of every rank of a shard group; other groups repeat it.
        exchange_bytes: for each optimizer what leaves each of those ranks in a step.
        collectives: for each optimizer how many a step makes.
        gradient_traffic: bytes that leave a rank when one step's gradients are reduced, by a ring.
        activations: of one sequence, by kind of checkpointing.
        model: its shape.
    """

    name: str
    parameters: int
    options: Options
    ranks: Mapping[str, tuple[Memory, ...]]
    exchange_bytes: Mapping[str, tuple[int, ...]]
    collectives: Mapping[str, int]
    gradient_traffic: int
    activations: Mapping[str, Activations]
    model: ModelConfig

    def worst(self, optimizer: str) -> tuple[int, Memory]:
        """The rank that needs most, and what it needs."""
        ranks = self.ranks[optimizer]
        rank = max(range(len(ranks)), key=lambda k: ranks[k].total)
        return rank, ranks[rank]

    def fits(self, optimizer: str) -> bool:
        """Whether the worst rank's memory fits beside the reserve."""
        return self.worst(optimizer)[1].total <= self.options.gpu_memory - self.options.reserve

    def largest_micro_batch(self, optimizer: str, checkpointing: str | None = None) -> int:
        """The largest micro-batch that fits on every rank; 0 if none does."""
        chosen = self.options.checkpointing if checkpointing is None else checkpointing
        budget = self.options.gpu_memory - self.options.reserve
        if any(replace(memory, activations=0).total > budget for memory in self.ranks[optimizer]):
            return 0
        room = min(budget - memory.kept - memory.gathered for memory in self.ranks[optimizer])
        # Activations grow with the micro-batch, in a chunked loss not in proportion.
        sizes = range(1, room + 2)
        return bisect_right(sizes, room, key=lambda size: _activations(self.model, self.options, chosen, size).peak)

    def traffic_share(self, optimizer: str) -> float:
        """What the busiest rank sends in a step's exchange, as a share of the gradients' reduction; 0 on one rank."""
        return max(self.exchange_bytes[optimizer]) / self.gradient_traffic if self.gradient_traffic else 0.0


def forecast(name: str, model: ModelConfig, options: Options) -> Forecast:
    """Plan a run of the trainer's LLaMA.

    Args:
        name: of the model, for the output.
        model: its shape.
        options: engine, machines, precision.

    Raises:
        ValueError: if APOLLO's rank is larger than all matrices allow.
    """
    module = meta_model(model, options.sequence_length)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    low = {kind: _low_rank(module, rank) for kind, rank in (("apollo", options.rank), ("apollo-mini", MINI["rank"]))}
    low["adamw"] = low["apollo"]
    low |= {kind: low["apollo"] if kind in OF_RANK else set() for kind in RULES}  # none: one parameter group
    estimates = _estimates(module, shapes, low, options)
    each = {chosen: _activations(model, options, chosen, 1) for chosen in CHECKPOINTING}
    activation_bytes = _activations(model, options, options.checkpointing, options.micro_batch).peak
    common = {kind: _common(shapes, chosen, options, activation_bytes) for kind, chosen in low.items()}
    return Forecast(
        name=name,
        parameters=_numel(shapes),
        options=options,
        ranks={
            optimizer: tuple(
                _placed(replace(common[optimizer], state=state, exchange=buffer), options)
                for state, buffer in zip(found.state_bytes, found.buffer_bytes, strict=True)
            )
            for optimizer, found in estimates.items()
        },
        exchange_bytes={optimizer: found.exchange_bytes for optimizer, found in estimates.items()},
        collectives={optimizer: found.collectives for optimizer, found in estimates.items()},
        gradient_traffic=_gradient_traffic(_numel(shapes), options),
        activations=each,
        model=model,
    )


def _activations(model: ModelConfig, options: Options, checkpointing: str, micro_batch: int) -> Activations:
    chunk = options.loss_chunk if options.loss == "chunked" else None
    if options.loss == "liger":
        chunk = liger_chunk(model, micro_batch * options.sequence_length)
    return activations(
        model,
        micro_batch=micro_batch,
        sequence_length=options.sequence_length,
        compute_bytes=options.compute_bytes,
        autocast=options.engine == "ddp" and options.precision == "bf16",
        attention=options.attention,
        checkpointing=checkpointing,
        loss_chunk=chunk,
    )


def _low_rank(module: nn.Module, rank: int) -> set[str]:
    """Names of the low-rank matrices; ValueError if there are none."""
    choice = of_model(module, rank)
    check_any(choice, "the model", rank)
    return low_rank_names(choice)


def _estimates(module: Any, shapes: Shapes, low: Mapping[str, set[str]], options: Options) -> dict[str, Estimate]:
    """State and exchange of the optimizers, for every rank of a shard group."""
    of_rank: dict[str, dict[str, Any]] = {kind: {"rank": options.rank, "low_rank": low[kind]} for kind in OF_RANK}
    others = {
        kind: estimate_rule(
            shapes,
            rule,
            world=options.shards,
            layout=options.layout,
            roles=of_parameters(module),
            sub_group_size=options.sub_group_size,
            compute_bytes=options.compute_bytes,
            **of_rank.get(kind, {}),
            **({"adam_dtype": options.adam_dtype} if "adam_dtype" in rules_named(rule).options else {}),
        )
        for kind, rule in RULES.items()
    }
    return {**others, **_of_apollo_and_adamw(module, shapes, low, options)}


def _of_apollo_and_adamw(
    module: Any, shapes: Shapes, low: Mapping[str, set[str]], options: Options
) -> dict[str, Estimate]:
    kinds = {"apollo": {"rank": options.rank, "scale_type": options.scale_type}, "apollo-mini": MINI}
    shards = options.shards
    stored: dict[str, Any] = {"adam_dtype": options.adam_dtype}
    if options.layout == "fsdp2" and shards > 1:
        readings = read_fsdp2(module, options.world, shards, list(kinds.values()))
        found = {
            kind: estimate_plans(reading.plans, reading.rest.values(), shards, group=stored)
            for kind, reading in zip(kinds, readings, strict=True)
        }
        partitions = [*readings[0].low_rank.values(), *readings[0].rest.values()]
        return found | {"adamw": estimate_plans([], partitions, shards, group=stored)}
    found = {
        kind: estimate(
            shapes,
            **chosen,
            world=shards,
            layout=options.layout,
            low_rank=low[kind],
            sub_group_size=options.sub_group_size,
            compute_bytes=options.compute_bytes,
            **stored,
        )
        for kind, chosen in kinds.items()
    }
    if options.layout in ("zero", "zero3"):
        # One parameter group, and torch's AdamW works on DeepSpeed's flat tensors, padding included.
        state = (4 if options.adam_dtype == "bfloat16" else 8) * shard_numel(shapes, (), options.layout, shards)
        return found | {"adamw": Estimate((state,) * shards, (0,) * shards, 0, (0,) * shards)}
    parts = divide(shapes, (), options.layout, shards, options.compute_bytes).values()
    return found | {"adamw": estimate_plans([], parts, shards, group=stored)}


def _common(shapes: Shapes, low: set[str], options: Options, activation_bytes: int) -> Memory:
    """What does not depend on the optimizer, and is the same on every rank."""
    numel, engine = _numel(shapes), options.engine
    share = shard_numel(shapes, low, options.layout, options.shards, options.compute_bytes)
    stored = numel if options.layout in ("whole", "zero") else share
    kept = numel if options.layout == "whole" or engine == "zero1" else share
    if options.layerwise:
        kept = _one_gradient(shapes, low, options)
    step = 0
    if engine in ("zero1", "zero2") or (engine == "zero0" and options.has_masters):
        step = 4 * share
    elif engine == "zero3" and options.gradient_bytes < 4:
        step = 4 * min(share, options.sub_group_size)
    return Memory(
        weights=options.weight_bytes * stored - _saved_by_int8(shapes, options),
        gradients=options.gradient_bytes * kept,
        masters=4 * share if options.has_masters else 0,
        state=0,
        buckets=_buckets(numel, options),
        gathered=_gathered(shapes, options),
        activations=activation_bytes,
        step_gradients=step,
        exchange=0,
    )


def _saved_by_int8(shapes: Shapes, options: Options) -> int:
    """Bytes of a rank's weights that INT8 saves: codes take one a number, scales one number a row."""
    if options.weights is None:
        return 0
    quantized = [shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    numel, rows = sum(map(math.prod, quantized)), sum(shape[0] for shape in quantized)
    return ((options.weight_bytes - 1) * numel - options.weight_bytes * rows) // options.shards


def _placed(memory: Memory, options: Options) -> Memory:
    """The same after offloading: what is in host memory leaves the device."""
    if options.offload == "none":
        return memory
    moved = {"masters": 0, "state": 0, "step_gradients": 0}
    if options.engine != "zero1":
        moved["gradients"] = 0
    if options.offload == "all":
        moved["weights"] = 0
    return replace(memory, **moved, host=sum(getattr(memory, key) for key in moved))


def _one_gradient(shapes: Shapes, low: set[str], options: Options) -> int:
    """Elements of gradients at a time if each is used up at once; FSDP2 reduces those of a block together."""
    if options.shards == 1:
        return max(math.prod(shape) for shape in shapes.values())
    return max(shard_numel(unit, low, options.layout, options.shards) for unit in units(shapes))


def _buckets(numel: int, options: Options) -> int:
    if options.engine == "ddp":
        return 0 if options.bucket_view or options.world == 1 else options.gradient_bytes * numel
    if options.engine.startswith("zero"):
        # Two of them, since ds_configs/ set overlap_comm.
        return 2 * options.compute_bytes * min(options.bucket_elements, numel)
    return 0


def _gathered(shapes: Shapes, options: Options) -> int:
    """Parameters in use, and gradients on their way to the reduction."""
    compute, numel = options.compute_bytes, _numel(shapes)
    if options.engine == "ddp" and options.precision == "bf16":
        # Autocast keeps a bf16 copy of every matrix until the backward pass is over.
        return compute * sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and "embed" not in n)
    if options.engine == "zero3":
        return compute * (min(numel, options.max_live) + max(math.prod(shape) for shape in shapes.values()))
    if options.engine not in ("fsdp1", "fsdp2", "hsdp"):
        return 0
    sizes = [_numel(unit) for unit in units(shapes)]
    root, block = sizes[0], max(sizes[1:], default=0)
    # The root stays gathered, with its gradient; of blocks the one in use and the next, a gradient, and what it is
    # reduced from, in fp32.
    return compute * (2 * root + 3 * block) + 4 * block


def _gradient_traffic(numel: int, options: Options) -> int:
    """Bytes that a ring's rank sends to reduce the gradients of one step."""
    number = 4 if options.precision == "bf16" and options.engine in ("ddp", "fsdp1", "fsdp2", "hsdp") else 0
    number = number or options.compute_bytes
    if options.engine in ("ddp", "zero0"):
        return 2 * number * numel * (options.world - 1) // options.world
    scattered = number * numel * (options.shards - 1) // options.shards
    replicas = options.world // options.shards
    return scattered + 2 * number * numel // options.shards * (replicas - 1) // replicas


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
