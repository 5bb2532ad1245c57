"""A step of a training run."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from apollo_dist.pretrain.distributed import SetupError, alike
from apollo_dist.pretrain.metrics import memory_bytes
from apollo_dist.pretrain.utilization import utilization

if TYPE_CHECKING:
    from apollo_dist.pretrain.run import Run


def train_step(run: Run) -> None:
    """One optimizer step over ``batch_size`` sequences of all ranks; logs the mean loss over all of them.

    The host waits for the device once, after the last backward pass has been launched: for the loss, whether gradients
    are finite, and what the ranks have to tell each other. (Twice more with ``--layerwise``; and DeepSpeed waits for
    what it looks at itself.)

    A step with gradients that are not finite on some rank is left out on all of them. Raises SetupError on every rank
    alike where a rank could not read its data, before any weight changes, or after too many steps left out in a row.
    """
    began = time.perf_counter()
    lr = float(run.engine.optimizer.param_groups[0]["lr"])
    batches, problem = _next_batches(run)
    total = torch.zeros((), dtype=torch.float64, device=run.ranks.device)  # losses
    for number, tokens in enumerate(batches, 1):
        with run.engine.micro_batch(last=number == len(batches)):
            loss = run.engine.losses(tokens[:, :-1], tokens[:, 1:]).mean()
            total += loss.detach()
            if run.engine.updates_in_backward:
                mean, finite = _agree(run, total, problem, None)
            run.engine.backward(loss)
    if not run.engine.updates_in_backward:
        mean, finite = _agree(run, total, problem, run.engine.judge())
    with alike():
        made = run.engine.update(finite)
    run.step += 1
    run.skipped = 0 if made else run.skipped + 1
    seconds = time.perf_counter() - began
    tokens_per_step = run.config.batch_size * run.config.sequence_length
    # JSON has no number that is not finite.
    about: dict[str, float] = {"loss": mean} if math.isfinite(mean) else {}
    if not made:
        about["skipped"] = run.skipped
    speed = tokens_per_step / seconds
    share = utilization(run.config, speed, run.ranks.world, run.peak_flops)
    if share is not None:
        about["mfu"] = share
    run.metrics.train(
        {
            "step": run.step,
            **about,
            "lr": lr,
            "tokens": run.step * tokens_per_step,
            "tokens_per_s": speed,
            "peak_memory": memory_bytes(run.ranks.device),
            "elapsed": run.metrics.elapsed + seconds,
        }
    )
    if not made:
        _tell_skipped(run, mean)


def _tell_skipped(run: Run, loss: float) -> None:
    run.metrics.say(
        f"step {run.step} left out: gradients are not finite on some rank; its loss is {loss:.4f}, "
        f"{run.skipped} step(s) left out in a row"
    )
    if run.skipped > run.config.max_skipped_steps:
        raise SetupError(
            f"gradients were not finite in {run.skipped} steps in a row, up to step {run.step} with loss {loss:.4f}, "
            f"and max_skipped_steps is {run.config.max_skipped_steps}: lower the learning rate, or check the data"
        )


def _next_batches(run: Run) -> tuple[list[torch.Tensor], Exception | None]:
    """This rank's micro-batches of a step; or zeros, and why there are no others.

    The forward passes of sharded engines are collectives: a rank without data has to take part until all have heard.
    """
    plan, device = run.plan, run.ranks.device
    try:
        return [moved(run.data.train.take(plan.micro), device) for _ in range(plan.accumulation)], None
    except Exception as error:  # whatever it is, the other ranks must hear of it
        nothing = torch.zeros(plan.micro, run.config.sequence_length + 1, dtype=torch.int64, device=device)
        return [nothing] * plan.accumulation, error


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` of the CPU on ``device``, without waiting for it: from pinned memory, where that is needed."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _agree(run: Run, total: torch.Tensor, problem: Exception | None, spoilt: torch.Tensor | None) -> tuple[float, bool]:
    """The step's loss over all ranks, and whether gradients are finite on all of them, in one sum.

    What the run has been asked for meanwhile is agreed on in the same sum. SetupError on every rank if one could not
    read its data.
    """
    told = torch.tensor([problem is not None, *run.requests.counts()], dtype=total.dtype)
    bad = torch.zeros_like(total) if spoilt is None else spoilt.to(total.dtype)
    summed, infinite, failed, *asked = run.ranks.sum(torch.cat([torch.stack([total, bad]), moved(told, total.device)]))
    if failed:
        run.ranks.share(problem)
    run.requests.agree(asked)
    return summed / (run.plan.accumulation * run.ranks.world), not infinite
