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
from apollo_dist.pretrain.optimizer_config import ApolloConfig
from apollo_dist.pretrain.settings import load_settings

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import machine, synchronize
from roofline import LINK, WORLD, Roofline
from tracker import CATEGORIES, engine_of, step, tracked

TOLERANCE = 0.05
LIMIT_7B, LIMIT_13B = 11.5e9, 72e9
# Optimizers of the throughput claim. torch's AdamW keeps its moments in the weights' dtype.
MOMENTS = (("adamw", "fp32"), ("adamw", "bf16"), ("apollo", "fp32"), ("apollo-mini", "fp32"))


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


def planned(config: Config, name: str, micro: int, bucket_view: bool = True) -> Forecast:
    """The planner's forecast for DDP on eight ranks, the trainer's or with torch's default of ``bucket_view``."""
    apollo = configuration(config.recipe, "apollo").optimizer
    assert isinstance(apollo, ApolloConfig)
    return forecast(
        name,
        config.model,
        Options(
            engine="ddp", world=WORLD, precision=config.precision, sequence_length=config.sequence_length,
            micro_batch=micro, attention=config.attention, checkpointing=config.activation_checkpointing,
            loss=config.loss, loss_chunk=config.loss_chunk, rank=apollo.rank, bucket_view=bucket_view,
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


def claim_throughput(arguments: argparse.Namespace) -> int:
    """LLaMA-7B: the largest micro-batch of each optimizer, and what it would make of the tokens a second."""
    recipe = arguments.recipe or "7B-throughput"
    print(f"# {recipe}, one rank of {WORLD} in DDP on 80 GB, less a reserve of 2 GB; modelled for A100-80GB")
    for title, view in (("Gradients are views of DDP's buckets, as in the trainer", True), ("torch's default", False)):
        print(f"\n{title}\n\n{'optimizer':24}{'largest':>9}{'used':>6}{'planned GB':>12}", end="")
        print(f"{'tokens/s a GPU':>16}{'a step each':>13}")
        rows = {}
        for optimizer, moments in MOMENTS:
            config = configuration(recipe, optimizer)
            row = throughput_line(config, moments, view, arguments if view else None)
            rows |= {} if row is None else {(optimizer, moments): row}
        throughput_ratios(rows, config.batch_size // WORLD)
    return 0


def throughput_line(config: Config, moments: str, view: bool, arguments: argparse.Namespace | None) -> Roofline | None:
    """Plan and model one optimizer, and run it on a device if ``arguments`` name one; None if it does not fit."""
    name, share = config.optimizer.name, config.batch_size // WORLD
    found = planned(config, config.recipe, 1, view)
    if moments == "bf16":  # the planner's are fp32
        ranks = tuple(replace(memory, state=memory.state // 2) for memory in found.ranks[name])
        found = replace(found, ranks={**found.ranks, name: ranks})
    largest = found.largest_micro_batch(name)
    used = next((size for size in range(min(largest, share), 0, -1) if share % size == 0), 0)
    title = f"{name}, {moments} moments"
    state = found.worst(name)[1].state
    if not used:
        print(f"{title:24}{largest:9}{'-':>6}   needs {found.worst(name)[1].total / 1e9:.1f} GB at 1")
        return None
    model = Roofline.of(config, used, state)
    peak = planned(config, config.recipe, used, view).worst(name)[1].total - (state if moments == "bf16" else 0)
    print(f"{title:24}{largest:9}{used:6}{peak / 1e9:12.1f}{model.tokens_per_s(share // used):16,.0f}", end="")
    print(f"{model.tokens_per_s(1):13,.0f}")
    if arguments is not None and arguments.device != "fake":
        measured_line(config, used, arguments, peak)
    return model


def throughput_ratios(rows: dict[tuple[str, str], Roofline], share: int) -> None:
    """Print how much faster than AdamW the others are, and how slow a link would make them three times as fast."""
    base = rows.get(("adamw", "fp32")) or rows.get(("adamw", "bf16"))
    for (name, _), row in rows.items():
        if base is None or name == "adamw":
            continue
        accumulated = row.tokens_per_s(share // row.micro) / base.tokens_per_s(share // base.micro)
        print(f"ratio {name} to AdamW that fits: {accumulated:.2f}, ", end="")
        print(f"with a step for each micro-batch {row.tokens_per_s(1) / base.tokens_per_s(1):.2f}", end="")
        seconds = row.reduction_for(3.0, base)
        if seconds:
            print(f", 3.00 where gradients travel at {LINK * row.reduce / seconds / 1e9:.0f} GB/s", end="")
        print()


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
