"""A forecast as stacked bars."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .memory import OPTIMIZERS, Forecast
from .report import ROWS, TITLES


def draw(forecast: Forecast, target: Path) -> bool:
    """Write the worst rank's memory under each optimizer as stacked bars, with the device's memory as a line.

    Returns False, and draws nothing, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options = forecast.options
    figure, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    bars = [TITLES[optimizer] for optimizer in OPTIMIZERS]
    bottom = [0.0] * len(bars)
    colours = pyplot.get_cmap("tab10")
    for number, (key, title) in enumerate(ROWS.items()):
        heights = []
        for optimizer in OPTIMIZERS:
            memory = forecast.worst(optimizer)[1]
            in_step = key in ("step_gradients", "exchange")
            passes = memory.gathered + memory.activations >= memory.step_gradients + memory.exchange
            # Only what is there at the peak: the passes' part or the step's.
            counted = key not in ("gathered", "activations", "step_gradients", "exchange") or in_step != passes
            heights.append(getattr(memory, key) / 1e9 if counted else 0.0)
        if any(heights):
            axes.bar(bars, heights, 0.6, bottom=bottom, label=title, color=colours(number))
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(options.gpu_memory / 1e9, color="black", linewidth=1, linestyle="--", label="device memory")
    axes.axhline((options.gpu_memory - options.reserve) / 1e9, color="black", linewidth=0.6, linestyle=":")
    axes.set(ylabel="GB on the worst rank, at the peak")
    axes.set_title(
        f"{forecast.name}, {options.engine} on {options.world} ranks, {options.precision}, "
        f"micro-batch {options.micro_batch} x {options.sequence_length}",
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, dpi=150)
    pyplot.close(figure)
    return True
