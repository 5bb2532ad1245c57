"""What only a GPU can show: a step there is the step taken on the CPU, and it never makes the host wait.

Each comparison runs on the CPU too, against itself or with the other projection cache, so that it is exercised
everywhere; ``benchmarks/gpu.sh`` runs the CUDA half.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel

from apollo_dist import APOLLO, APOLLOMini
from apollo_dist.projections import gaussian as projection

from ..timeouts import allowed
from .gpu_runs import batches, made

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = ["cpu", CUDA]
KINDS = {"channel": (APOLLO, {"rank": 4}), "tensor": (APOLLOMini, {})}


def set_gradients(model: nn.Module, step: int) -> None:
    """The same random gradients on every device, drawn on the CPU."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter)


def train(model: nn.Module, kind: str, cache: bool | str, steps: int = 7) -> torch.optim.Optimizer:
    cls, options = KINDS[kind]
    optimizer = cls(model, lr=1e-2, update_proj_gap=3, cache_projection=cache, **options)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_step_equals_the_cpu_step(device: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    expected, actual = made("cpu", dtype), made(device, dtype)
    train(expected, kind, cache=True)
    train(actual, kind, cache=False)
    for (name, want), got in zip(expected.named_parameters(), actual.parameters(), strict=True):
        torch.testing.assert_close(
            got.cpu(), want, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("device", DEVICES)
def test_the_projection_cache_changes_nothing(device: str) -> None:
    kept, redrawn, automatic = (made(device, torch.float32) for _ in range(3))
    for model, cache in ((kept, True), (redrawn, False), (automatic, "auto")):
        train(model, "channel", cache)
    for a, b, c in zip(kept.parameters(), redrawn.parameters(), automatic.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("device", DEVICES)
def test_projections_are_those_of_the_cpu(device: str) -> None:
    want = projection.gaussian(3, "layers.0.weight", 2, 8, 1001)
    got = projection.gaussian(3, "layers.0.weight", 2, 8, 1001, device=device)
    assert got.device.type == device
    assert torch.equal(got.cpu(), want)
    slab = projection.gaussian(3, "layers.0.weight", 2, 8, 1001, 17, 640, device=device)
    assert torch.equal(slab, got[:, 17:640])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_on_the_device_is_exact(device: str, kind: str) -> None:
    model = made(device, torch.bfloat16)
    optimizer = train(model, kind, cache="auto", steps=4)
    twin = copy.deepcopy(model)
    cls, options = KINDS[kind]
    resumed = cls(twin, lr=1e-2, update_proj_gap=3, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, 8):
        for m, o in ((model, optimizer), (twin, resumed)):
            set_gradients(m, step)
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [True, False])
def test_a_step_never_waits_for_the_device(kind: str, cache: bool) -> None:
    model = made("cuda", torch.bfloat16)
    optimizer = train(model, kind, cache, steps=2)
    set_gradients(model, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # every synchronizing call raises
    try:
        for _ in range(4):  # one of them redraws the projections
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fsdp1_with_cpu_offload_equals_the_cpu_step(tmp_path) -> None:
    """FSDP1 pins what it offloads, so that its offload runs on accelerators only."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        expected, actual = made("cpu", torch.float64), made("cpu", torch.float64)
        wrapped = FullyShardedDataParallel(
            actual, use_orig_params=True, device_id=0, cpu_offload=CPUOffload(offload_params=True)
        )
        optimizers = [APOLLO(model, rank=4, update_proj_gap=3) for model in (expected, wrapped)]
        for tokens in batches():
            for model, optimizer, batch in zip((expected, wrapped), optimizers, (tokens, tokens.cuda()), strict=True):
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for want, got in zip(expected.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(got.cpu().view(want.shape), want, rtol=1e-9, atol=1e-9)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_engines_of_one_rank_take_the_cpus_steps(device: str) -> None:
    """FSDP1, FSDP2 and ZeRO 0 to 3, over NCCL on a GPU."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra: pip install 'apollo-dist[deepspeed]'")
    words = [sys.executable, "-m", f"{__package__}.gpu_runs", device]
    done = subprocess.run(words, capture_output=True, text=True, timeout=allowed(200))
    assert done.returncode == 0, done.stdout + done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 6
    for engine, error in errors.items():
        assert error < (1e-4 if engine.startswith("ZeRO") else 1e-9), errors
