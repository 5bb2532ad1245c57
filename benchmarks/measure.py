"""Time, memory and machine: the measuring that ``step_time.py`` rests on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean wall-clock seconds of ``calls`` calls in a row; the device is idle before the first and after the last."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory held at any moment of ``call`` beyond what was held before it.

    CUDA: the caching allocator's own peak. CPU: the running sum of all allocations and releases that torch's allocator
    reported to the profiler; work space inside oneDNN or MKL is not seen there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # profiler.events() leaves these out; the raw results have one for each allocation (> 0) and release (< 0).
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """One line on where the numbers are taken, with the load of the last minute: others' work slows a CPU run."""
    cores = f"{cpu_model()}, {os.cpu_count()} cores, load before the run {os.getloadavg()[0]:.1f}"
    if device.type != "cuda":
        return cores
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB ({cores})"
