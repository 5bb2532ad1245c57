"""Every engine in a world of one rank on a device, beside the same steps on the CPU without an engine; prints errors.

    python -m tests.kernels.gpu_runs cuda

A process of its own: NCCL and DeepSpeed keep much of what they have made.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from apollo_dist import APOLLO
from apollo_dist.sharding.names import canonical_name

from ..engines import full_weights, initialize, zero_config
from ..models import relative_error

STEPS, OPTIONS = 7, {"lr": 1e-2, "update_proj_gap": 3, "weight_decay": 0.1}


class Model(nn.Module):
    """Tall, wide and square matrices inside blocks, and tensors for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 29), nn.Tanh(), nn.Linear(29, 12, bias=False), nn.Linear(12, 12))
            for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x


def made(device: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).to(device)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(7, (3, 5), generator=generator) for _ in range(STEPS)]


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices of the blocks with rank 4, all else without one."""
    named = [(canonical_name(name), p) for name, p in model.named_parameters()]
    low = [(name, p) for name, p in named if "layers" in name and name.endswith("weight")]
    kept = {name for name, _ in low}
    return [{"params": low, "rank": 4}, {"params": [(name, p) for name, p in named if name not in kept]}]


def stepped(model: nn.Module, wrapped: nn.Module, device: str) -> dict[str, Tensor]:
    """The weights after steps of the wrapped model, by the model's names, in float64."""
    optimizer = APOLLO(groups(wrapped), model=wrapped, **OPTIONS)
    for tokens in batches():
        wrapped(tokens.to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {canonical_name(name): p for name, p in model.named_parameters()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double().cpu() for n, p in found.items()}


def plain(dtype: torch.dtype) -> dict[str, Tensor]:
    model = made("cpu", dtype)
    return stepped(model, model, "cpu")


def fsdp1(device: str) -> dict[str, Tensor]:
    model = made(device, torch.float64)
    on = {"device_id": 0 if device == "cuda" else torch.device("cpu")}
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, **on)
    found = stepped(model, wrapped, device)
    shapes = {name: p.shape for name, p in made("cpu", torch.float64).named_parameters()}
    return {name: p.view(shapes[name]) for name, p in found.items()}


def fsdp2(device: str) -> dict[str, Tensor]:
    model = made(device, torch.float64)
    mesh = init_device_mesh(device, (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return stepped(model, model, device)


def zero(device: str, stage: int) -> dict[str, Tensor]:
    model = made("cpu", torch.float32)
    engine = initialize(model, zero_config(stage), optimizer=APOLLO(groups(model), **OPTIONS))
    for tokens in batches():
        engine.backward(engine(tokens.to(device)).square().mean())
        engine.step()
    return {name: weight.cpu() for name, weight in full_weights(engine, model).items()}


def everything(device: str) -> dict[str, float]:
    """Of each engine the largest relative error of a weight."""
    exact, single = plain(torch.float64), plain(torch.float32)
    runs: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Tensor]]] = {
        "FSDP1": (lambda: fsdp1(device), exact),
        "FSDP2": (lambda: fsdp2(device), exact),
    }
    runs |= {f"ZeRO-{stage}": (lambda stage=stage: zero(device, stage), single) for stage in range(4)}
    errors = {}
    for name, (run, expected) in runs.items():
        found = run()
        assert found.keys() == expected.keys(), name
        errors[name] = max(float(relative_error(found[key], expected[key])) for key in expected)
    return errors


if __name__ == "__main__":
    where = sys.argv[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if where == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        print(json.dumps(everything(where)), flush=True)
        dist.destroy_process_group()
