"""Host memory that a rank needs to make its initial weights, as a multiple of what it keeps.

Starts real ranks for one engine after another, builds what the trainer builds (the model on the meta device, the
engine around it, the weights), and reads the kernel's high-water mark of each process. On a machine without a GPU
weights live in host memory, so the peak holds the shard itself; with one, only what passes through the host.

    python benchmarks/initial_memory.py --recipe 350M --ranks 4 --write initial_memory_350M_cpu

The first columns are of the weights alone, the last of the whole engine with its optimizer: DeepSpeed allocates
masters, gradient partitions and buckets while it starts, whatever made the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import machine

ENGINES = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.3


def memory(key: str) -> int:
    """``VmRSS`` (resident now) or ``VmHWM`` (its high-water mark) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reset_high_water() -> None:
    """Set ``VmHWM`` to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def rank_main(rank: int, engine: str, arguments: argparse.Namespace, folder: str) -> None:
    """One rank: build the engine, and leave its numbers in ``folder``."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(arguments.ranks), LOCAL_WORLD_SIZE=str(arguments.ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    import deepspeed
    import transformers.models.llama.modeling_llama  # noqa: F401  part of what importing takes

    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.distributed import Ranks
    from apollo_dist.pretrain.engines import build_engine
    from apollo_dist.pretrain.engines.deepspeed_json import reconcile
    from apollo_dist.pretrain.model import deferred_model
    from apollo_dist.pretrain.settings import load_settings

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.ranks)
    deepspeed.init_distributed("gloo")
    ranks = Ranks(rank, arguments.ranks, torch.device("cpu"))
    zero = engine.startswith("zero")
    chosen = f"--deepspeed_config={ROOT}/ds_configs/{engine}_bf16.json" if zero else f"--engine={engine}"
    config, values = reconcile(load_settings(["--recipe", arguments.recipe, chosen]), arguments.ranks)
    # The library's own modules of the engine, and torch's, are imported by a first small engine of the kind.
    tiny, tiny_values = reconcile(load_settings(["--recipe", "tiny", chosen, "--precision", "bf16"]), arguments.ranks)
    plan = BatchPlan(arguments.ranks, 1, 1, arguments.ranks)
    build_engine(tiny, tiny_values, plan, deferred_model(tiny.model, 8), ranks)
    ranks.barrier()
    before = memory("VmRSS")
    reset_high_water()
    seen: dict[str, Any] = {"imports": before}

    import apollo_dist.pretrain.engines.native as native

    def placed(what: nn.Module) -> None:
        seen["placed"] = memory("VmHWM") - before
        seen["held"] = memory("VmRSS") - before

    # The weights are there when the optimizer is built, under every engine.
    for module in (native, sys.modules.get("apollo_dist.pretrain.engines.deepspeed")):
        if module is not None:
            build = module.build_optimizer

            def watched(config: Any, model: nn.Module, *rest: Any, build: Any = build, **more: Any) -> Any:
                placed(model)
                return build(config, model, *rest, **more)

            module.build_optimizer = watched
    model = deferred_model(config.model, config.sequence_length)
    numel = sum(p.numel() for p in model.parameters())
    began = time.perf_counter()
    built = build_engine(config, values, plan, model, ranks)
    seen |= {"seconds": time.perf_counter() - began, "engine": memory("VmHWM") - before, "parameters": numel}
    seen["shard"] = shard_bytes(engine, numel, arguments.ranks)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    ranks.barrier()
    del built
    os._exit(0)  # DeepSpeed's threads would keep the process


def shard_bytes(engine: str, numel: int, world: int) -> int:
    """Bytes of weights that a rank keeps: fp32 under DDP and FSDP; bf16 under ZeRO, before its fp32 masters."""
    share = -(-numel // world)
    return {"ddp": 4 * numel, "fsdp1": 4 * share, "fsdp2": 4 * share, "zero3": 2 * share}.get(engine, 2 * numel)


def measure(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the rank with the highest peak."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        started = [
            context.Process(target=rank_main, args=(rank, engine, arguments, folder)) for rank in range(arguments.ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        found = [json.loads(Path(folder, f"{rank}.json").read_text("utf-8")) for rank in range(arguments.ranks)]
    return max(found, key=lambda seen: seen["placed"])


def report(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The table in Markdown."""
    command = "python benchmarks/initial_memory.py " + " ".join(sys.argv[1:])
    parameters = next(iter(rows.values()))["parameters"]
    lines = [
        f"# Host memory of initial weights: LLaMA {arguments.recipe}, {arguments.ranks} ranks, CPU",
        "",
        f"- Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
        f"- Machine: {machine(torch.device('cpu'))}",
        f"- Versions: torch {torch.__version__}, deepspeed {version('deepspeed')}, Python {platform.python_version()}",
        f"- Command: `{command}`",
        f"- {parameters:,} parameters; the rank with the highest peak; MB are 1e6 bytes",
        "",
        "| engine | weights it keeps | peak while they are made | over what it keeps | resident afterwards | "
        "imports, not counted | peak of the whole engine | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, seen in rows.items():
        cells = [f"{seen[key] / 1e6:,.0f} MB" for key in ("shard", "placed")]
        cells += [f"**{seen['placed'] / seen['shard']:.2f}**"]
        cells += [f"{seen[key] / 1e6:,.0f} MB" for key in ("held", "imports", "engine")] + [f"{seen['seconds']:.0f}"]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command; exit code 1 if an engine's peak is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="350M")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest peak over what a rank keeps (default 1.3)")
    parser.add_argument("--write", metavar="NAME", help="also write benchmarks/results/NAME.md")
    arguments = parser.parse_args()
    rows = {engine: measure(engine, arguments) for engine in arguments.engines}
    text = report(rows, arguments)
    print(text)
    if arguments.write:
        target = ROOT / "benchmarks" / "results" / f"{arguments.write}.md"
        target.write_text(text, encoding="utf-8")
    over = [engine for engine, seen in rows.items() if seen["placed"] > arguments.limit * seen["shard"]]
    if over:
        print(f"over {arguments.limit} x what a rank keeps: {', '.join(over)}", file=sys.stderr)
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
