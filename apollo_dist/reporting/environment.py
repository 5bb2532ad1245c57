"""The lines of ``python -m apollo_dist env``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import apollo_dist
from apollo_dist.pretrain.versions import ABSENT, code_digest, driver, revision

PACKAGES = (
    "deepspeed", "transformers", "accelerate", "lightning", "datasets", "peft", "trl", "axolotl", "llamafactory",
    "apollo-torch", "numpy", "triton",
)  # fmt: skip
# Beginnings of the names of variables that change how training runs.
PREFIXES = (
    "ACCELERATE_", "APOLLO_", "CUDA_", "CUBLAS_", "DEEPSPEED_", "DS_", "FSDP_", "GLOO_", "HIP_", "KMP_", "LOCAL_",
    "MKL_", "NCCL_", "NVIDIA_", "OMP_", "ONEDNN_", "PYTORCH_", "RANK", "ROCR_", "TORCH", "TRITON_", "UCX_",
    "WORLD_SIZE", "XLA_",
)  # fmt: skip
SLURM = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_GPUS_PER_NODE", "SLURM_CPUS_PER_TASK")
SECRET = ("KEY", "PASSWORD", "SECRET", "TOKEN")


def report(model: str | None = None, rank: int = 256, deepspeed_config: str | None = None) -> int:
    """Print the report.

    Args:
        model: as of ``python -m apollo_dist choose``; None: without a choice of matrices.
        rank: of the projections.
        deepspeed_config: path of a DeepSpeed JSON; None: without an engine.

    Returns:
        0, or 2 where the model or the file cannot be read, which is printed as well: the rest is still of use.
    """
    lines = [*software(), *devices(), *variables(os.environ)]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
    code = 0
    for title, source, describe in (
        (f"choice of matrices, rank {rank}", model, lambda given: choice(given, rank)),
        ("DeepSpeed configuration", deepspeed_config, engine),
    ):
        if source is None:
            continue
        print(f"\n{title}: {source}")
        try:
            for line in describe(source):
                print(line)
        except (OSError, ValueError) as error:
            print(f"cannot be read: {error}")
            code = 2
    return code


def software() -> Iterator[tuple[str, str]]:
    """Names and versions of everything that takes part; ``none`` for what is not installed."""
    at = revision()
    state = "no repository" if at is None else f"git {at['commit']}" + (", with changes" if at["dirty"] else "")
    yield "apollo_dist", f"{apollo_dist.__version__} ({state}; code {code_digest()})"
    yield "python", f"{platform.python_version()} ({sys.implementation.name}, {platform.platform()})"
    yield "torch", torch.__version__
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    yield "CUDA", f"{torch.version.cuda or ABSENT}, driver {driver()}, cuDNN {cudnn or ABSENT}"
    if torch.version.hip:
        yield "ROCm", torch.version.hip
    yield "NCCL", _nccl()
    yield "gloo", "with torch" if dist.is_available() and dist.is_gloo_available() else ABSENT
    for name in PACKAGES:
        yield name, _version(name)


def _nccl() -> str:
    if not (torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()):
        return ABSENT
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def devices() -> Iterator[tuple[str, str]]:
    """The accelerators of this machine, and its CPUs."""
    if not torch.cuda.is_available():
        yield "devices", "no CUDA device"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"capability {about.major}.{about.minor}"
        yield f"device {number}", f"{about.name}, {about.total_memory / 2**30:.1f} GiB, {capability}"
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{platform.machine()}, {own} of {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"


def variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that change how training runs; none whose name sounds like a secret's."""
    for name in sorted(environment):
        if name in SLURM or (name.startswith(PREFIXES) and not any(word in name for word in SECRET)):
            yield name, environment[name]


def choice(source: str, rank: int) -> list[str]:
    """The table of ``python -m apollo_dist choose``."""
    from ..selection.choice import of_model
    from ..selection.command import meta_model
    from ..selection.describe import table

    if rank < 1:
        raise ValueError(f"--rank must be at least 1, got {rank}")
    return table(of_model(meta_model(source), rank, None).values()).splitlines()


def engine(path: str) -> Iterator[str]:
    """What a DeepSpeed configuration does with the parameters, and everything that is wrong with it."""
    from ..integrations.deepspeed_config import lint

    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object")
    yield f"engine: {', '.join(layout(config))}"
    yield f"optimizer: {json.dumps(config.get('optimizer', 'from the code'))}"
    # Whether the Hugging Face Trainer fills in "auto" is not known here, so "auto" is nothing to report.
    findings = lint.check(config, hugging_face='"auto"' in json.dumps(config))
    yield from (f"lint: {finding}" for finding in findings or ["nothing to say"])


def layout(config: Mapping[str, Any]) -> Iterator[str]:
    """In words: the stage and what it divides, precision, offload, clipping, accumulation."""
    zero = config.get("zero_optimization") or {}
    zero = zero if isinstance(zero, dict) else {"stage": int(zero)}
    stage = zero.get("stage", 0)
    held = {
        0: "whole parameters",
        1: "flat partitions of the optimizer's state",
        2: "flat partitions of gradients and state",
        3: "flat partitions of parameters, gradients and state",
    }
    yield f"ZeRO-{stage} ({held.get(stage, 'unknown')})"
    enabled = [name for name in ("bf16", "fp16", "torch_autocast") if (config.get(name) or {}).get("enabled")]
    yield " and ".join(enabled) or "fp32"
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            yield f"{key} to {zero[key]['device']}"
    for key in ("zero_hpz_partition_size", "mics_shard_size", "overlap_comm"):
        if key in zero:
            yield f"{key} {zero[key]}"
    for key in ("gradient_clipping", "gradient_accumulation_steps"):
        yield f"{key} {config.get(key, 'not given')}"
