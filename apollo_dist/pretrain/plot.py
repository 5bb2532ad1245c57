"""Loss curves from ``metrics.jsonl``: of one run, and of several with ``python -m apollo_dist.pretrain.plot``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from apollo_dist.pretrain.metrics import FILE, read_rows


def plot(runs: Mapping[str, Path], target: Path) -> bool:
    """Draw training and validation loss (nats per token, against steps) of the metrics files ``runs``, by label.

    Returns False, and draws nothing, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, path in runs.items():
        rows = read_rows(path)
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        valid = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        (line,) = axes.plot(*zip(*train, strict=True), linewidth=0.8, alpha=0.5) if train else axes.plot([], [])
        if valid:
            bits = [row["bits_per_byte"] for row in rows if "validation_loss" in row]
            last = f", validation {valid[-1][1]:.3f}" + (f" ({bits[-1]:.3f} bits per byte)" if bits[-1] else "")
            axes.plot(*zip(*valid, strict=True), marker="o", markersize=3, color=line.get_color(), label=label + last)
        else:
            line.set_label(label)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(title="thin: training; dots: validation")
    figure.savefig(target, dpi=150)
    pyplot.close(figure)
    return True


def main() -> int:
    """Compare runs: their output folders, and where to write the picture."""
    parser = argparse.ArgumentParser(description="Draw the loss curves of several runs in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders; LABEL=FOLDER to name one")
    parser.add_argument("--output", type=Path, default=Path("loss.png"))
    options = parser.parse_args()
    named = [(str(run).partition("=")) for run in options.runs]
    runs = {(label if rest else Path(label).name): Path(rest or label) / FILE for label, _, rest in named}
    if not plot(runs, options.output):
        print("matplotlib is not installed: pip install 'apollo-dist[plot]'")
        return 1
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
