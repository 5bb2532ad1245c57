"""The paper's claims, each by one command: 7B on 12 GB, 13B in plain DDP on 80 GB, throughput by larger micro-batches.

    python benchmarks/claims.py 7b-12gb      # memory of LLaMA-7B in INT8, one process, updates inside backward
    python benchmarks/claims.py 13b-ddp      # memory of LLaMA-13B, one rank of eight
    python benchmarks/claims.py throughput   # LLaMA-7B: largest micro-batches and modelled tokens/s on 8 x A100-80GB

Without a GPU the real model takes two full training steps under fake tensors, and torch's memory tracker says what is
held at the peak (``tracker.py`` says how), beside the planner's forecast; the command fails where they differ by over
5 %. ``--device cuda`` runs 20 steps and prints the allocator's peak and tokens/s. docs/claims.md says what comes out.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from apollo_dist.planning.memory import OPTIMIZERS, Forecast, forecast
from apollo_dist.planning.options import Options
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.model import deferred_model
from apollo_dist.pretrain.optimizer_config import ApolloConfig
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.utilization import flops_per_token

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import machine, synchronize
from tracker import CATEGORIES, engine_of, step, tracked

WORLD = 8
TOLERANCE = 0.05
LIMIT_7B, LIMIT_13B = 11.5e9, 72e9
# NVIDIA's data sheet of the A100-80GB SXM: dense bf16 FLOPs/s, bytes/s of memory, bytes/s of NVLink in one direction.
PEAK, BANDWIDTH, LINK = 312e12, 2039e9, 300e9


@dataclass(frozen=True)
class Measured:
    """Bytes at the peak, tokens a second, and the last loss in nats."""

    peak: int
    tokens_per_s: float
    loss: float


def configuration(recipe: str, optimizer: str, *more: str) -> Config:
    """The recipe with another optimizer, in pure bf16: autocast is DDP's own, which does not run here."""
    return load_settings(["--recipe", recipe, "--optimizer", optimizer, "--precision", "bf16-pure", *more]).config


def run_steps(config: Config, micro: int, device: torch.device, steps: int, memory: int) -> Measured:
    """``steps`` real steps on a device that may use ``memory`` bytes; the allocator's peak on a GPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
    engine, _ = engine_of(config, device)
    step(engine, config, micro, device)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        loss = step(engine, config, micro, device)
    synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(peak, steps * micro * config.sequence_length / seconds, float(loss))


def planned(config: Config, name: str, micro: int) -> Forecast:
    """The planner's forecast for the trainer's DDP on eight ranks."""
    apollo = configuration(config.recipe, "apollo").optimizer
    assert isinstance(apollo, ApolloConfig)
    return forecast(
        name,
        config.model,
        Options(
            engine="ddp", world=WORLD, precision=config.precision, sequence_length=config.sequence_length,
            micro_batch=micro, attention=config.attention, checkpointing=config.activation_checkpointing,
            loss=config.loss, loss_chunk=config.loss_chunk, rank=apollo.rank,
        ),
    )  # fmt: skip


def planned_bytes(found: Forecast, config: Config) -> dict[str, int]:
    """The worst rank's forecast in the tracker's categories.

    The planner gives AdamW moments in fp32. torch's AdamW keeps them in the parameters' dtype, so that they are half as
    large where weights are bf16, and that is what runs here.
    """
    name = config.optimizer.name
    memory = found.worst(name)[1]
    if name == "adamw" and config.precision == "bf16-pure":
        memory = replace(memory, state=memory.state // 2)
    return {
        "Parameter": memory.weights,
        "Gradient": memory.gradients + memory.buckets,
        "Optstate": memory.state,
        "Activation": memory.activations,
        "Temp": 0,
        "Total": memory.total,
    }


def claim_13b(arguments: argparse.Namespace) -> int:
    """LLaMA-13B in the trainer's DDP at micro-batch 1 x 256: Mini, APOLLO and AdamW."""
    recipe, micro = arguments.recipe or "13B-DDP", arguments.micro_batch
    print(f"# {recipe}, one rank of {WORLD} in DDP, micro-batch {micro}, GB (1e9 bytes)\n")
    failed = False
    for optimizer in arguments.optimizers:
        config = configuration(recipe, optimizer)
        forecasted = planned_bytes(planned(config, recipe, micro), config)
        if arguments.device != "fake":
            failed |= not measured_line(config, micro, arguments, forecasted["Total"])
            continue
        print(f"{optimizer:12}" + "".join(f"{category:>12}" for category in CATEGORIES))
        failed |= not tracked_lines(config, micro, forecasted, LIMIT_13B, 80)
    return int(failed)


def claim_7b(arguments: argparse.Namespace) -> int:
    """LLaMA-7B in INT8 in one process with updates inside backward, at micro-batch 1 x 256: Mini."""
    recipe = arguments.recipe or "7B-12GB"
    more = () if recipe == "7B-12GB" else ("--weights", "int8", "--layerwise", "--batch_size", "1")
    config = configuration(recipe, "apollo-mini", *more)
    options = Options(
        engine="ddp", world=1, gpus_per_node=1, gpu_memory=12 * 10**9, reserve=5 * 10**8, precision=config.precision,
        weights=config.weights, layerwise=True, sequence_length=config.sequence_length, attention=config.attention,
        checkpointing=config.activation_checkpointing, loss=config.loss, loss_chunk=config.loss_chunk, rank=1,
    )  # fmt: skip
    forecasted = planned_bytes(forecast(recipe, config.model, options), config)
    print(f"# {recipe}, one process, micro-batch 1, GB (1e9 bytes)\n")
    if arguments.device != "fake":
        return int(not measured_line(config, 1, arguments, forecasted["Total"]))
    print(f"{config.optimizer.name:12}" + "".join(f"{category:>12}" for category in CATEGORIES))
    return int(not tracked_lines(config, 1, forecasted, LIMIT_7B, 12))


def tracked_lines(config: Config, micro: int, forecasted: dict[str, int], limit: float, size: int) -> bool:
    """Track a step and print it beside the planner's forecast; whether they agree, and whether Mini has the room.

    Args:
        config, micro: of the run.
        forecasted: bytes by category.
        limit: what Mini may take.
        size: of the device, in GB.
    """
    seen = tracked(config, micro)
    rows = {"tracker": seen, "planner": forecasted}
    if config.optimizer.name == "adamw":  # which is torch's
        rows["foreach"] = tracked(config, micro, foreach=True)
    for title, values in rows.items():
        print(f"  {title:10}" + "".join(f"{values[category] / 1e9:12.3f}" for category in CATEGORIES))
    off = forecasted["Total"] / seen["Total"] - 1
    wrong = abs(off) > TOLERANCE
    over = config.optimizer.name == "apollo-mini" and seen["Total"] > limit
    fits = "fits" if seen["Total"] <= size * 1e9 - (2e9 if size > 12 else 5e8) else "does not fit"
    told = f", over the {TOLERANCE:.0%} that are allowed" if wrong else ""
    print(f"  planner {off:+.1%}{told}; {fits} {size} GB less a reserve\n", flush=True)
    return not wrong and not over


def measured_line(config: Config, micro: int, arguments: argparse.Namespace, forecasted: int) -> bool:
    """Run on a device and print a line; whether it ran in the memory that was given."""
    device = torch.device(arguments.device)
    try:
        seen = run_steps(config, micro, device, arguments.steps, arguments.memory)
    except torch.cuda.OutOfMemoryError:
        print(f"{config.optimizer.name}: out of memory at micro-batch {micro}; planned {forecasted / 1e9:.1f} GB")
        return False
    print(
        f"{config.optimizer.name}: micro-batch {micro}, peak {seen.peak / 1e9:.2f} GB (planned "
        f"{forecasted / 1e9:.2f}), {seen.tokens_per_s:,.0f} tokens/s, loss {seen.loss:.3f} ({machine(device)})"
    )
    return True


def modelled_tokens_per_s(config: Config, micro: int, state_bytes: int, state_traffic: float) -> float:
    """Tokens a second of one of eight A100s, by a roofline model; an upper bound.

    A pass over a micro-batch takes its FLOPs at the peak, or as long as three reads of the weights if that is longer;
    then gradients are added to those there are (two reads, a write). A step adds a ring all-reduce of the gradients and
    the optimizer's reads and writes. Nothing overlaps.
    """
    numel = sum(p.numel() for p in deferred_model(config.model, config.sequence_length).parameters())
    accumulation = max(1, config.batch_size // WORLD // micro)
    tokens = micro * config.sequence_length
    compute = max(flops_per_token(config.model, config.sequence_length) * tokens / PEAK, 3 * 2 * numel / BANDWIDTH)
    one_pass = compute + 3 * 2 * numel / BANDWIDTH
    reduce = 2 * (WORLD - 1) / WORLD * 2 * numel / LINK
    update = (state_traffic * 2 * numel + 2 * state_bytes) / BANDWIDTH
    return accumulation * tokens / (accumulation * one_pass + reduce + update)


def claim_throughput(arguments: argparse.Namespace) -> int:
    """LLaMA-7B: the largest micro-batch of each optimizer, and what it would make of the tokens a second."""
    recipe = arguments.recipe or "7B-throughput"
    print(f"# {recipe}, one rank of {WORLD} in DDP on 80 GB, less a reserve of 2 GB; modelled for A100-80GB\n")
    print(f"{'optimizer':24}{'largest':>9}{'used':>6}{'planned GB':>12}{'tokens/s a GPU':>16}")
    rates: dict[str, float] = {}
    for optimizer, moments in (("adamw", "fp32"), ("adamw", "bf16"), ("apollo", "fp32"), ("apollo-mini", "fp32")):
        config = configuration(recipe, optimizer)
        found = planned(config, recipe, 1)
        if moments == "bf16":  # the planner's are fp32
            ranks = tuple(replace(memory, state=memory.state // 2) for memory in found.ranks[optimizer])
            found = replace(found, ranks={**found.ranks, optimizer: ranks})
        largest = found.largest_micro_batch(optimizer)
        share = config.batch_size // WORLD
        used = next((size for size in range(min(largest, share), 0, -1) if share % size == 0), 0)
        title = f"{optimizer}, {moments} moments"
        if not used:
            print(f"{title:24}{largest:9}{'-':>6}   needs {found.worst(optimizer)[1].total / 1e9:.1f} GB at 1")
            continue
        # Weights and gradients are read, weights written; APOLLO reads the gradient twice.
        traffic = 3.0 if optimizer == "adamw" else 4.0
        rate = modelled_tokens_per_s(config, used, found.worst(optimizer)[1].state, traffic)
        rates[title] = rate
        peak = planned(config, recipe, used).worst(optimizer)[1].total
        peak -= 0 if moments == "fp32" else found.worst(optimizer)[1].state
        print(f"{title:24}{largest:9}{used:6}{peak / 1e9:12.1f}{rate:16,.0f}")
        if arguments.device != "fake":
            measured_line(config, used, arguments, peak)
    base = rates.get("adamw, fp32 moments") or rates.get("adamw, bf16 moments")
    for title, rate in rates.items():
        if base and not title.startswith("adamw"):
            print(f"ratio {title} to AdamW with what fits: {rate / base:.2f}")
    return 0


def main() -> int:
    """The command; exit code 1 where a claim or the planner fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=("7b-12gb", "13b-ddp", "throughput"))
    parser.add_argument("--recipe", help="another one than the claim's, such as tiny")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["apollo-mini", "apollo", "adamw"])
    parser.add_argument("--device", default="fake", help="fake (the default), cuda, or cpu for a small recipe")
    parser.add_argument("--micro-batch", type=int, default=1, help="of 13b-ddp (default 1)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory", type=float, default=80e9, help="bytes that may be used on a GPU (default 80e9)")
    arguments = parser.parse_args()
    return {"7b-12gb": claim_7b, "13b-ddp": claim_13b, "throughput": claim_throughput}[arguments.claim](arguments)


if __name__ == "__main__":
    sys.exit(main())
