"""The end of a training run: asked to stop, or finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apollo_dist.pretrain.metrics import FILE
from apollo_dist.pretrain.optimizers import adamw_bytes, state_bytes
from apollo_dist.pretrain.plot import plot
from apollo_dist.pretrain.stop import FINISHED_FILE, STOPPED, STOPPED_FILE, record
from apollo_dist.pretrain.watchdog import SLOW

if TYPE_CHECKING:
    from apollo_dist.pretrain.run import Run


def stop(run: Run) -> int:
    """Leave a checkpoint of this step and the record of the stop, and return the exit code; collective."""
    if run.step:
        run.save()
    newest = run.checkpoints.finish()
    reason = run.requests.reason
    path = run.config.output_folder / STOPPED_FILE
    run.ranks.on_first(lambda: record(path, run.step, newest, {"reason": reason}))
    run.requests.stopped()
    left = "nothing to save yet" if newest is None else f"saved in {newest}"
    run.metrics.say(f"stopped after step {run.step} ({reason}), {left}; --resume continues, exit code {STOPPED}")
    return STOPPED


def finish(run: Run) -> None:
    """Draw ``loss.png``, print the summary and write ``finished.json``; collective."""
    run.watchdog.mark("the end of the run", SLOW)
    newest = run.checkpoints.finish()
    held = run.ranks.max(state_bytes(run.engine.optimizer))
    more = {"optimizer_state_bytes": held}
    run.ranks.on_first(lambda: record(run.config.output_folder / FINISHED_FILE, run.step, newest, more))
    run.requests.stopped()
    validated = run.validated
    adamw = run.ranks.max(adamw_bytes(run.engine.optimizer, run.engine.trained))
    if run.ranks.first:
        folder = run.config.output_folder
        run.metrics.close()
        steps = [row for row in run.metrics.rows if "loss" in row]
        parts = [f"{run.optimizer_name} after {run.step} steps"]
        if steps:
            mean_speed = steps[-1]["tokens"] / steps[-1]["elapsed"]
            parts += [f"training loss {steps[-1]['loss']:.4f}"]
        if validated is not None:
            parts += [f"validation loss {validated.loss:.4f}", f"perplexity {validated.perplexity:.3f}"]
            if validated.bits_per_byte is not None:
                parts += [f"bits per byte {validated.bits_per_byte:.4f}"]
        if steps:
            parts += [f"{mean_speed:,.0f} tokens/s"]
        print("summary: " + ", ".join(parts))
        share = f" ({held / adamw:.0%})" if adamw else ""
        print(f"optimizer state per rank: {held:,} bytes; AdamW would take {adamw:,}{share}")
        if plot({run.optimizer_name: folder / FILE}, folder / "loss.png"):
            print(f"wrote {folder / FILE} and {folder / 'loss.png'}", flush=True)
        else:
            print(f"wrote {folder / FILE}; no loss.png: pip install 'apollo-dist[plot]' for matplotlib", flush=True)
