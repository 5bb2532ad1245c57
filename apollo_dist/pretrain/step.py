"""A step of a training run."""

from __future__ import annotations

import math
import time

import torch

from apollo_dist.pretrain.distributed import SetupError, alike
from apollo_dist.pretrain.model import token_losses
from apollo_dist.pretrain.run import Run


def train_step(run: Run) -> None:
    """One optimizer step over ``batch_size`` sequences of all ranks; logs the mean loss over all of them.

    A step with gradients that are not finite on some rank is left out on all of them. Raises SetupError on every rank
    alike where a rank could not read its data, before any weight changes, or after too many steps left out in a row.
    """
    began = time.perf_counter()
    lr = float(run.engine.optimizer.param_groups[0]["lr"])
    batches, problem = _next_batches(run)
    total = torch.zeros((), dtype=torch.float64, device=run.ranks.device)  # losses
    for number, tokens in enumerate(batches, 1):
        with run.engine.micro_batch(last=number == len(batches)):
            loss = token_losses(run.engine.logits(tokens[:, :-1]), tokens[:, 1:]).mean()
            total += loss.detach()
            if number == len(batches):
                mean = _mean_loss(run, total, problem)
            run.engine.backward(loss)
    with alike():
        made = run.engine.update()
    run.step += 1
    run.skipped = 0 if made else run.skipped + 1
    seconds = time.perf_counter() - began
    tokens_per_step = run.config.batch_size * run.config.sequence_length
    # JSON has no number that is not finite.
    about: dict[str, float] = {"loss": mean} if math.isfinite(mean) else {}
    if not made:
        about["skipped"] = run.skipped
    run.metrics.train(
        {
            "step": run.step,
            **about,
            "lr": lr,
            "tokens": run.step * tokens_per_step,
            "tokens_per_s": tokens_per_step / seconds,
            "elapsed": run.metrics.elapsed + seconds,
        },
        run.ranks.device,
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
        return [run.data.train.take(plan.micro).to(device) for _ in range(plan.accumulation)], None
    except Exception as error:  # whatever it is, the other ranks must hear of it
        nothing = torch.zeros(plan.micro, run.config.sequence_length + 1, dtype=torch.int64, device=device)
        return [nothing] * plan.accumulation, error


def _mean_loss(run: Run, total: torch.Tensor, problem: Exception | None) -> float:
    """The step's loss over all ranks; SetupError on each of them if one could not read its data.

    What the run has been asked for meanwhile is agreed on in the same sum.
    """
    more = torch.tensor([problem is not None, *run.requests.counts()], dtype=total.dtype, device=total.device)
    summed, failed, *asked = run.ranks.sum(torch.cat([total[None], more]))
    if failed:
        run.ranks.share(problem)
    run.requests.agree(asked)
    return summed / (run.plan.accumulation * run.ranks.world)
