"""What APOLLO's exchange costs at 8 to 4096 ranks: tables from the plans that a run would make. No GPU, no processes.

    python benchmarks/scaling.py                                      # docs/scaling.md's tables
    python benchmarks/scaling.py --models 13B --worlds 8 64 --layouts fsdp2
    python benchmarks/scaling.py --real 13B 64                        # real fully_shard on meta weights plans the same

Each row makes the plan and one rank's exchange as a run does; bytes, messages and state are the largest over all ranks.
Times are CPU seconds of this machine; memory is what Python and NumPy hold for plan and exchange afterwards
(tracemalloc, in a second pass).

Exit status 1 if ``--real`` finds another plan.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from apollo_dist.exchange.collectives import Exchange
from apollo_dist.exchange.plan import MatrixSpec, Plan, make_plan
from apollo_dist.exchange.whole import traffic
from apollo_dist.rules.apollo import APOLLO
from apollo_dist.rules.fira import Fira
from apollo_dist.rules.galore import GaLore
from apollo_dist.rules.muon import Muon
from apollo_dist.rules.roles import LINEAR, ROLE, Role
from apollo_dist.sharding.local_shard import ShardGroup
from apollo_dist.sharding.regions import FlatPartition, Range, cut_ranges, even_ranges, flat_partition_tiles, row_ranges
from apollo_dist.step.specs import exchanged

if TYPE_CHECKING:
    from apollo_dist.rules.base import MatrixRule

Shape = tuple[int, int]
Shapes = dict[str, tuple[int, ...]]

# hidden, ffn, layers, width of k and v
MODELS = {"13B": (5120, 13824, 40, 5120), "70B": (8192, 28672, 80, 1024)}
VOCABULARY = 32000
LAYOUTS = ("fsdp2", "fsdp1", "zero3", "zero1")
RULE = APOLLO()


def _with_defaults(rule: MatrixRule) -> dict[str, Any]:
    """The options of a group of linear maps."""
    return {**{key: option.default for key, option in rule.options.items()}, ROLE: Role(LINEAR)}


_DEFAULTS = _with_defaults(RULE)
OPTIMIZERS = {"APOLLO": _DEFAULTS, "Mini": {**_DEFAULTS, "rank": 1, "scale_type": "tensor"}}
# Of the table of rules: each with its options.
RULES: dict[str, tuple[MatrixRule, dict[str, Any]]] = {
    **{name: (RULE, options) for name, options in OPTIMIZERS.items()},
    **{rule.name: (rule, _with_defaults(rule)) for rule in (GaLore(), Fira(), Muon())},
}
WORLDS = (8, 64, 256, 1024, 4096)
NUMBER = 4  # bytes: exchanges and states are fp32
GRADIENT = 2  # bytes: of an element in the gradients' reduce-scatter, bf16


def block_shapes(model: str, layer: int) -> Shapes:
    """A decoder layer's parameters in LLaMA's order."""
    hidden, ffn, _, narrow = MODELS[model]
    shapes: Shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def parameters(model: str) -> int:
    """Elements of the whole model, embeddings and head included."""
    hidden, _, layers, _ = MODELS[model]
    block = sum(math.prod(shape) for shape in block_shapes(model, 0).values())
    return layers * block + 2 * VOCABULARY * hidden + hidden


def partitions(model: str, layout: str, world: int) -> dict[str, tuple[Shape, FlatPartition]]:
    """What each rank holds of each matrix.

    FSDP1 wraps each decoder layer: its parameters are one flat buffer, cut evenly. ZeRO-1 (and 2) cut one flat buffer
    of all matrices, padded to two elements a rank. ZeRO-3 cuts each parameter evenly, FSDP2 into rows.
    """
    blocks = [block_shapes(model, layer) for layer in range(MODELS[model][2])]
    matrices = {name: shape for block in blocks for name, shape in block.items() if len(shape) == 2}
    ranges: dict[str, tuple[Range, ...]] = {}
    if layout == "fsdp1":
        for block in blocks:
            ranges |= _flat(block, -(-sum(map(math.prod, block.values())) // world), world)
    elif layout == "zero1":
        ranges = _flat(matrices, 2 * -(-sum(map(math.prod, matrices.values())) // (2 * world)), world)
    for name, (m, n) in matrices.items():
        if layout == "fsdp2":
            ranges[name] = row_ranges(m, n, world)
        elif layout == "zero3":
            ranges[name] = even_ranges(m * n, world)
    return {name: ((shape[0], shape[1]), FlatPartition(ranges[name])) for name, shape in matrices.items()}


def _flat(shapes: Shapes, partition: int, world: int) -> dict[str, tuple[Range, ...]]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    starts = accumulate(sizes.values(), initial=0)
    return {
        name: cut_ranges(start, size, partition, world)
        for (name, size), start in zip(sizes.items(), starts, strict=False)
    }


def specs(model: str, layout: str, optimizer: str, world: int) -> list[MatrixSpec]:
    """The matrices as the planner sees them."""
    rule, options = RULES[optimizer]
    return [
        exchanged(name, m, n, rule.spec(m, n, options), partition.tiles(0, m, n))
        for name, ((m, n), partition) in partitions(model, layout, world).items()
    ]


def prepare(model: str, layout: str, optimizer: str, world: int) -> tuple[Plan, Exchange]:
    """All that the middle rank works out before its first step."""
    for known in (flat_partition_tiles, row_ranges, even_ranges):
        known.cache_clear()
    plan = make_plan(specs(model, layout, optimizer, world), world)
    assert plan.digest
    return plan, Exchange(plan, ShardGroup(None, world, world // 2), torch.float32, torch.device("cpu"))


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes and messages are the largest over all ranks."""

    first: int
    second: int
    share: float
    peers_first: int
    peers_second: int | None
    balance: float
    seconds: float
    memory: int | None


def measure(model: str, layout: str, optimizer: str, world: int, memory: bool = True) -> Row:
    """Plan one run."""
    gc.collect()
    start = time.process_time()
    plan, exchange = prepare(model, layout, optimizer, world)
    seconds = time.process_time() - start
    held = None
    if memory:
        del plan, exchange
        gc.collect()
        tracemalloc.start()
        plan, exchange = prepare(model, layout, optimizer, world)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    sent = [plan.numbers_sent(rank) for rank in range(world)]
    owned = [plan.owned_numbers(rank) for rank in range(world)]
    middle = world // 2
    assert exchange.bytes_sent == tuple(NUMBER * numbers for numbers in sent[middle])
    most = max(sum(numbers) for numbers in sent)
    scattered = parameters(model) * (world - 1) / world * GRADIENT
    return Row(
        first=NUMBER * max(numbers[0] for numbers in sent),
        second=NUMBER * max(numbers[1] for numbers in sent),
        share=NUMBER * most / scattered,
        peers_first=_peers_first(plan),
        peers_second=None if plan.reduces else _peers_second(plan),
        balance=max(owned) * world / sum(owned),
        seconds=seconds,
        memory=held,
    )


def _peers_first(plan: Plan) -> int:
    """To how many others a rank has something to send in exchange 1."""
    sends = np.zeros((plan.world_size, plan.world_size), dtype=bool)
    for holders, owners, _ in plan.flows():
        sends[holders, owners] = True
    np.fill_diagonal(sends, False)
    return int(sends.sum(axis=1).max())


def _peers_second(plan: Plan) -> int:
    """The same for exchange 2 as an all-to-all: norm terms go to all that hold a matrix."""
    together = np.zeros((plan.world_size, plan.world_size), dtype=bool)
    for ranks in {m.participants.tobytes(): m.participants for m in plan.matrices if m.spec.late_terms}.values():
        together[np.ix_(ranks, ranks)] = True
    np.fill_diagonal(together, False)
    return int(together.sum(axis=1).max())


HEADER = (
    "| layout | ranks | exchange 1 | exchange 2 | of gradients | messages 1 | messages 2 | state max/mean | planning "
    "| plan memory |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(layout: str, world: int, row: Row) -> str:
    """A row of the table in Markdown."""
    second = "all-reduce" if row.peers_second is None else str(row.peers_second)
    cells = [
        *(layout, str(world), _size(row.first), _size(row.second), f"{100 * row.share:.3g} %", str(row.peers_first)),
        *(second, f"{row.balance:.3f}", f"{row.seconds:.2f} s", "-" if row.memory is None else _size(row.memory)),
    ]
    return "| " + " | ".join(cells) + " |"


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def rule_table(model: str, layouts: Sequence[str], worlds: Sequence[int]) -> Iterator[str]:
    """What the busiest rank sends in a step under each rule, as a share of the gradients, in lines of Markdown."""
    yield f"| rule | layout | {' | '.join(f'{world} ranks' for world in worlds)} |"
    yield "|---|---|" + "---|" * len(worlds)
    for name in RULES:
        for layout in layouts:
            shares, refreshes = [], []
            for world in worlds:
                plan = make_plan(specs(model, layout, name, world), world)
                whole = traffic(plan, NUMBER)
                scattered = parameters(model) * (world - 1) / world * GRADIENT
                most = max(NUMBER * sum(plan.numbers_sent(rank)) + int(whole.sent[rank]) for rank in range(world))
                shares.append(f"{100 * most / scattered:.2g} %")
                refreshes.append(f"{100 * int(whole.refresh_sent.max()) / scattered:.2g} %")
            yield f"| {name} | {layout} | {' | '.join(shares)} |"
            if name == "GaLore":
                yield f"| a refresh by SVD | {layout} | {' | '.join(refreshes)} |"


def same_plan(model: str, world: int) -> bool:
    """Whether real ``fully_shard`` on a meta LLaMA, under a fake process group, plans what the arithmetic here says."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig, LlamaForCausalLM

    from apollo_dist.selection.choice import low_rank_names, of_model
    from apollo_dist.sharding.deepspeed.zero import Engine
    from apollo_dist.sharding.detect import read
    from apollo_dist.step.specs import specs_of

    hidden, ffn, layers, narrow = MODELS[model]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=narrow // 128,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for block in llama.get_submodule("model.layers").children():
            fully_shard(block, mesh=mesh)
        fully_shard(llama, mesh=mesh)
        names = {id(p): name for name, p in llama.named_parameters()}
        chosen = low_rank_names(of_model(llama, rank=1))
        start = time.perf_counter()
        found = []
        for shard in read(list(llama.parameters()), lambda p: names[id(p)], Engine()):
            if shard.name in chosen:
                found += [spec for _, spec, _ in specs_of(shard, RULE, OPTIMIZERS["APOLLO"])]
        real = make_plan(found, world)
        print(
            f"{model} on {world} ranks: {len(found)} matrices read and planned in {time.perf_counter() - start:.2f} s"
        )
    finally:
        dist.destroy_process_group()
    return real.digest == make_plan(specs(model, "fsdp2", "APOLLO", world), world).digest


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or compare with a real layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--no-memory", action="store_true", help="leave out plan memory, which takes most of the time")
    parser.add_argument("--real", nargs=2, metavar=("MODEL", "RANKS"), help="compare with fully_shard on meta weights")
    parser.add_argument("--rules", action="store_true", help="the table of what all rules send, of the first model")
    args = parser.parse_args(arguments)
    if args.rules:
        for text in rule_table(args.models[0], args.layouts, args.worlds):
            print(text, flush=True)
        return 0
    if args.real:
        same = same_plan(args.real[0], int(args.real[1]))
        print("the same plan" if same else "error: another plan")
        return 0 if same else 1
    for model in args.models:
        for optimizer in args.optimizers:
            print(f"\n**LLaMA-{model}, {optimizer}**, {parameters(model) / 1e9:.1f} B parameters\n\n{HEADER}")
            for layout in args.layouts:
                for world in args.worlds:
                    print(line(layout, world, measure(model, layout, optimizer, world, not args.no_memory)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
