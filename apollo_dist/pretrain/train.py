"""A training run from its settings to its summary."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from importlib.metadata import version

import torch

from apollo_dist.agreement import agree
from apollo_dist.pretrain.batching import BatchPlan, plan_batch
from apollo_dist.pretrain.checkpoint import Checkpoints
from apollo_dist.pretrain.config import PLACE_KEYS, Config
from apollo_dist.pretrain.data import Data, build_data
from apollo_dist.pretrain.distributed import Ranks, SetupError, alike
from apollo_dist.pretrain.engines import Engine, build_engine
from apollo_dist.pretrain.engines.deepspeed_json import DeepSpeedJson, reconcile
from apollo_dist.pretrain.evaluate import Evaluation, evaluate
from apollo_dist.pretrain.metrics import FILE, Metrics, check_loggers
from apollo_dist.pretrain.model import build_model, model_facts, token_losses
from apollo_dist.pretrain.optimizers import adamw_bytes, state_bytes
from apollo_dist.pretrain.plot import plot
from apollo_dist.pretrain.settings import Settings


@dataclass
class Run:
    """Everything that training needs, set up and equal on all ranks."""

    config: Config
    plan: BatchPlan
    data: Data
    engine: Engine
    checkpoints: Checkpoints
    metrics: Metrics
    ranks: Ranks
    step: int  # steps done
    optimizer_name: str
    skipped: int = 0  # steps left out in a row


def train(settings: Settings, ranks: Ranks) -> None:
    """Set up, train to ``config.last_step``, validate, and write the summary; collective."""
    run = set_up(settings, ranks)
    with contextlib.closing(run.metrics):
        try:
            _train(run)
        except SetupError:  # which all ranks raise, so a save in the background can still be finished
            with contextlib.suppress(SetupError):
                run.checkpoints.finish()
            raise


def _train(run: Run) -> None:
    config = run.config
    validated = _last_validated(run)
    while run.step < config.last_step:
        train_step(run)
        if run.step == config.steps or (config.eval_every and run.step % config.eval_every == 0):
            validated = validate(run)
        due = config.checkpoint_every and run.step % config.checkpoint_every == 0
        if due or (run.step == config.last_step and (config.checkpoint_every or config.stop_after)):
            run.metrics.sync()
            run.checkpoints.save(run.step, run.engine, run.data)
    run.checkpoints.finish()
    finish(run, validated)


def set_up(settings: Settings, ranks: Ranks) -> Run:
    """Read the data, build the model, compare all of it between the ranks, and resume if asked; collective."""
    config, json, plan = ranks.together(lambda: _decide(settings, ranks.world))
    _agree({**config.computed(), "deepspeed JSON": None if json is None else json.values})
    # Other ranks of another configuration must hear of it before this one spends minutes on data.
    data = ranks.together(lambda: build_data(config, ranks.rank, ranks.world))
    model = ranks.together(lambda: build_model(config.model, config.sequence_length, config.seed))
    facts = {"data": data.digest, **model_facts(model)}
    _agree({**facts, "torch": version("torch"), "transformers": version("transformers")})
    shared = {key: value for key, value in config.computed().items() if key not in PLACE_KEYS}
    place: dict[str, object] = {"engine": config.engine, "ranks": ranks.world, "micro_batch_size": plan.micro}
    if json is not None:
        place["deepspeed JSON"] = json.values
    checkpoints = Checkpoints(config, {**shared, **facts}, place, ranks)
    if not config.resume:
        checkpoints.require_none()
    found = checkpoints.find() if config.resume else None
    with alike():
        engine = build_engine(config, json, plan, model, ranks)
    resumed = [] if found is None else checkpoints.load(found, engine, data)
    step = 0 if found is None else found.step
    metrics = ranks.together(lambda: Metrics(config, ranks.first, step))
    name = type(engine.optimizer).__name__
    for note in json.notes if json is not None else ():
        metrics.say(note)
    elements = facts["parameters"]
    metrics.say(
        f"LLaMA with {elements:,} parameters, {name}, {config.engine}, {ranks.world} rank(s) on {ranks.device.type}, "
        f"{plan.micro} x {plan.accumulation} sequences each per step of {config.batch_size} x {config.sequence_length}"
    )
    metrics.say(f"data: {data.description}")
    for note in resumed:
        metrics.say(note)
    return Run(config, plan, data, engine, checkpoints, metrics, ranks, step, name)


def train_step(run: Run) -> None:
    """One optimizer step over ``batch_size`` sequences of all ranks; logs the mean loss over all of them.

    A step with gradients that are not finite on some rank is left out on all of them. Raises SetupError on every rank
    alike where a rank could not read its data, before any weight changes, or after too many steps left out in a row.
    """
    began = time.perf_counter()
    lr = float(run.engine.optimizer.param_groups[0]["lr"])
    batches, problem = _next_batches(run)
    total = torch.zeros(2, dtype=torch.float64, device=run.ranks.device)  # losses; 1 if the data could not be read
    total[1] = float(problem is not None)
    for number, tokens in enumerate(batches, 1):
        with run.engine.micro_batch(last=number == len(batches)):
            loss = token_losses(run.engine.logits(tokens[:, :-1]), tokens[:, 1:]).mean()
            total[0] += loss.detach()
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
    """The step's loss over all ranks; SetupError on each of them if one could not read its data."""
    summed, failed = run.ranks.sum(total)
    if failed:
        run.ranks.share(problem)
    return summed / (run.plan.accumulation * run.ranks.world)


def validate(run: Run) -> Evaluation:
    """Evaluate and log; all of the validation data (or ``final_eval_sequences``) after the last step; collective."""
    config = run.config
    sequences = config.final_eval_sequences if run.step == config.steps else config.eval_sequences
    windows, micro, ratio = run.data.validation, run.plan.micro, run.data.bytes_per_token
    result = evaluate(run.engine, windows, micro, run.ranks, sequences, ratio)
    run.metrics.evaluation(
        {
            "step": run.step,
            "validation_loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "validation_tokens": result.tokens,
            "elapsed": run.metrics.elapsed,
        }
    )
    return result


def finish(run: Run, validated: Evaluation | None) -> None:
    """Draw ``loss.png`` and print the summary; collective."""
    held = run.ranks.max(state_bytes(run.engine.optimizer))
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


def _decide(settings: Settings, world: int) -> tuple[Config, DeepSpeedJson | None, BatchPlan]:
    config, json = reconcile(settings, world)
    check_loggers(config)
    return config, json, plan_batch(config.batch_size, config.micro_batch_size, world)


def _agree(facts: dict[str, object]) -> None:
    with alike():
        agree(facts)


def _last_validated(run: Run) -> Evaluation | None:
    """The validation of the step that a finished run is resumed at: it stands in the metrics."""
    for row in reversed(run.metrics.rows):
        if row["step"] == run.step == run.config.last_step and "validation_loss" in row:
            return Evaluation(row["validation_loss"], row["validation_tokens"], run.data.bytes_per_token)
    return None
