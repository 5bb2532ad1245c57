"""A forecast as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .memory import OPTIMIZERS, Forecast, Memory

# Field of ``Memory`` -> its row.
ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "masters": "fp32 masters",
    "state": "optimizer state",
    "buckets": "reduction buckets",
    "gathered": "gathered, unreduced",
    "activations": "activations",
    "step_gradients": "fp32 gradients in the step",
    "exchange": "exchange buffers in the step",
}
# Kind of checkpointing -> in words before "checkpointing".
WORDS = {"none": "without", "full": "with", "selective": "with selective"}
TITLES = {
    "apollo": "APOLLO",
    "apollo-mini": "APOLLO-Mini",
    "galore": "GaLore",
    "fira": "Fira",
    "muon": "Muon",
    "scale": "SCALE",
    "adam-mini": "Adam-mini",
    "adamw": "AdamW",
}


def gigabytes(number: int) -> str:
    """Bytes in GB (1e9), three digits after the point; small numbers in the unit that shows them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number >= size / 10 or (unit == "KB" and number):
            return f"{number / size:,.3f} {unit}" if unit == "GB" else f"{number / size:,.1f} {unit}"
    return "0"


def table(forecast: Forecast) -> str:
    """The worst rank's memory under the optimizers side by side, the largest micro-batch, and the traffic."""
    options = forecast.options
    worst = {optimizer: forecast.worst(optimizer) for optimizer in OPTIMIZERS}
    lines = [_title(forecast), ""]
    rows: list[Sequence[str]] = [["on the worst rank", *(TITLES[o] for o in OPTIMIZERS)]]
    for key, title in ROWS.items():
        if any(getattr(memory, key) for _, memory in worst.values()):
            rows.append([title, *(gigabytes(getattr(memory, key)) for _, memory in worst.values())])
    rows.append(["peak", *(gigabytes(memory.total) for _, memory in worst.values())])
    if any(memory.host for _, memory in worst.values()):
        rows.append(["in host memory", *(gigabytes(memory.host) for _, memory in worst.values())])
    rows.append([f"fits {gigabytes(options.gpu_memory)}", *("yes" if forecast.fits(o) else "no" for o in OPTIMIZERS)])
    for chosen, word in WORDS.items():
        most = [str(forecast.largest_micro_batch(o, chosen)) for o in OPTIMIZERS]
        rows.append([f"largest micro-batch, {word} checkpointing", *most])
    rows.append(["worst rank", *(str(rank) for rank, _ in worst.values())])
    rows.append(["state, largest over mean", *(f"{_imbalance(forecast.ranks[o]):.3f}" for o in OPTIMIZERS)])
    rows.append(["sent a step in the exchange", *(gigabytes(max(forecast.exchange_bytes[o])) for o in OPTIMIZERS)])
    rows.append(["as a share of gradient traffic", *(f"{forecast.traffic_share(o):.4%}" for o in OPTIMIZERS)])
    rows.append(["collectives a step", *(str(forecast.collectives[o]) for o in OPTIMIZERS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    lines += ["", *_notes(forecast)]
    return "\n".join(lines)


def _title(forecast: Forecast) -> str:
    options = forecast.options
    shards = f", {options.shards} shards" if options.engine == "hsdp" else ""
    words = [
        f"{forecast.name}: {forecast.parameters:,} parameters",
        f"{options.engine} on {options.world} ranks, {options.gpus_per_node} a node{shards}",
        f"{options.precision}, "
        + (f"weights {options.weights}, " if options.weights else "")
        + f"micro-batch {options.micro_batch} x {options.sequence_length} tokens, "
        f"{options.attention} attention"
        + (f", {options.checkpointing} checkpointing" if options.checkpointing != "none" else "")
        + (f", loss in chunks of {options.loss_chunk} tokens" if options.loss == "chunked" else "")
        + (", Liger's loss" if options.loss == "liger" else "")
        + (f", offload {options.offload}" if options.offload != "none" else "")
        + (", layer-wise updates" if options.layerwise else ""),
    ]
    return "\n".join(words)


def _notes(forecast: Forecast) -> list[str]:
    options = forecast.options
    one, other, some = (gigabytes(forecast.activations[chosen].peak) for chosen in WORDS)
    return [
        f"Activations of one sequence, by formula: {one}, with checkpointing {other}, selective {some}.",
        f"APOLLO has rank {options.rank} and {options.scale_type} scaling.",
        f"To reduce the gradients of a step a rank sends {gigabytes(forecast.gradient_traffic)}.",
        "The peak is that of the forward and backward pass or of the step, whichever is larger.",
        f"{gigabytes(options.reserve)} of the device's memory are set aside for what is not counted.",
    ]


def _imbalance(ranks: Sequence[Memory]) -> float:
    states = [memory.state or memory.host for memory in ranks]
    return max(states) * len(states) / sum(states) if sum(states) else 1.0


def as_json(forecast: Forecast) -> dict[str, Any]:
    """Everything as plain values; bytes are integers. Lists go by rank of a shard group."""
    result: dict[str, Any] = {
        "model": forecast.name,
        "parameters": forecast.parameters,
        "options": dataclasses.asdict(forecast.options),
        "shard_group_size": forecast.options.shards,
        "gradient_traffic_bytes": forecast.gradient_traffic,
        "activations_per_sequence": {
            WORDS[chosen].replace(" ", "_") + "_checkpointing": {**dataclasses.asdict(found), "peak": found.peak}
            for chosen, found in forecast.activations.items()
        },
        "optimizers": {},
    }
    for optimizer in OPTIMIZERS:
        rank, memory = forecast.worst(optimizer)
        result["optimizers"][optimizer] = {
            "worst_rank": rank,
            "memory": {**dataclasses.asdict(memory), "total": memory.total},
            "fits": forecast.fits(optimizer),
            "largest_micro_batch": forecast.largest_micro_batch(optimizer, "none"),
            "largest_micro_batch_with_checkpointing": forecast.largest_micro_batch(optimizer, "full"),
            "state_imbalance": _imbalance(forecast.ranks[optimizer]),
            "exchange_share_of_gradient_traffic": forecast.traffic_share(optimizer),
            "collectives": forecast.collectives[optimizer],
            "by_rank": {
                "total": [m.total for m in forecast.ranks[optimizer]],
                "state": [m.state for m in forecast.ranks[optimizer]],
                "exchange_bytes": list(forecast.exchange_bytes[optimizer]),
            },
        }
    return result
