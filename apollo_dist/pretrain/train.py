"""A training run from its settings to its summary."""

from __future__ import annotations

import contextlib
from importlib.metadata import version

import torch
from torch import nn

from apollo_dist.distributed import check_same_on_all_ranks
from apollo_dist.pretrain.checkpoint import Checkpoints
from apollo_dist.pretrain.compute import configure_compute
from apollo_dist.pretrain.config import COMPUTE_KEYS, PLACE_KEYS, Config
from apollo_dist.pretrain.data import build_data
from apollo_dist.pretrain.distributed import Ranks, SetupError, alike
from apollo_dist.pretrain.engines import build_engine
from apollo_dist.pretrain.evaluate import Evaluation, evaluate
from apollo_dist.pretrain.finish import finish, stop
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.metrics import Metrics
from apollo_dist.pretrain.model import deferred_model, model_facts
from apollo_dist.pretrain.resolve import resolve
from apollo_dist.pretrain.run import Run
from apollo_dist.pretrain.settings import Settings, overridable
from apollo_dist.pretrain.snapshot import snapshot
from apollo_dist.pretrain.step import train_step
from apollo_dist.pretrain.stop import FINISHED_FILE, Requests, clear
from apollo_dist.pretrain.utilization import peak_flops
from apollo_dist.pretrain.watchdog import SLOW, Watchdog


def train(settings: Settings, ranks: Ranks, requests: Requests, watchdog: Watchdog) -> int:
    """Set up, train to ``config.last_step``, validate, and write the summary; collective.

    Returns 0, or `STOPPED` where ``requests`` asked to stop before that.
    """
    run = set_up(settings, ranks, requests, watchdog)
    with contextlib.closing(run.metrics):
        try:
            return _train(run)
        except SetupError:  # which all ranks raise, so a save in the background can still be finished
            with contextlib.suppress(SetupError):
                run.checkpoints.finish()
            raise


def _train(run: Run) -> int:
    config = run.config
    patience = SLOW  # of the first step, in which kernels are compiled and memory is allocated
    run.go_on()
    while run.step < config.last_step or _validation_due(run):
        if run.requests.stop:
            return stop(run)
        if _validation_due(run):
            validate(run)
            continue
        run.watchdog.mark(f"step {run.step + 1}", patience)
        train_step(run)
        patience = 1.0
        if run.requests.save or _checkpoint_due(run):
            run.save()
    if run.requests.save:
        run.save()
    finish(run)
    return 0


def set_up(settings: Settings, ranks: Ranks, requests: Requests | None = None, watchdog: Watchdog | None = None) -> Run:
    """Read the data, build the model, compare all of it between the ranks, and resume if asked; collective."""
    requests = requests or Requests()
    watchdog = watchdog or Watchdog(0.0, str(ranks.rank), settings.config.output_folder)
    config, json, plan = ranks.together(lambda: resolve(settings, ranks.world))
    watchdog.folder = config.output_folder
    watchdog.meet(ranks)
    told = {"deepspeed JSON": None if json is None else json.values, "resume": config.resume}
    _agree({**config.computed(), **told, "override": config.override})
    override = ranks.together(lambda: overridable(config))
    cleared = ranks.on_first(lambda: clear(config.output_folder))
    if ranks.first:
        requests.look_in(config.output_folder)
    # Other ranks of another configuration must hear of it before this one spends minutes on data.
    data = ranks.together(lambda: build_data(config, ranks.rank, ranks.world))
    model = ranks.together(lambda: _deferred(config))
    facts = {"data": data.digest, **model_facts(model)}
    weights = ranks.together(lambda: InitialWeights.of(config, model).fingerprint())
    _agree({
        **facts, "initial weights": weights, "torch": version("torch"), "transformers": version("transformers"),
    })  # fmt: skip
    torch.manual_seed(config.seed)
    shared = {key: value for key, value in config.computed().items() if key not in PLACE_KEYS}
    place: dict[str, object] = {"engine": config.engine, "ranks": ranks.world, "micro_batch_size": plan.micro}
    place |= {key: getattr(config, key) for key in COMPUTE_KEYS}
    if json is not None:
        place["deepspeed JSON"] = json.values
    checkpoints = Checkpoints(config, {**shared, **facts}, place, ranks, override)
    resume = config.resume and not cleared.nothing_saved
    if not resume:
        checkpoints.require_none()
    found = checkpoints.find() if resume else None
    ranks.on_first(lambda: (config.output_folder / FINISHED_FILE).unlink(missing_ok=True))
    with alike():
        engine = build_engine(config, json, plan, model, ranks)
    resumed = [] if found is None else checkpoints.load(found, engine, data)
    step = 0 if found is None else found.step
    metrics = ranks.together(lambda: Metrics(config, ranks.first, step))
    snapshot(settings, config, json, plan, ranks, step, checkpoints.overridden)
    name = type(engine.optimizer).__name__
    for note in json.notes if json is not None else ():
        metrics.say(note)
    elements = facts["parameters"]
    metrics.say(
        f"LLaMA with {elements:,} parameters, {name}, {config.engine}, {ranks.world} rank(s) on {ranks.device.type}, "
        f"{plan.micro} x {plan.accumulation} sequences each per step of {config.batch_size} x {config.sequence_length}"
    )
    metrics.say(f"data: {data.description}")
    if resume != config.resume:
        resumed = ["nothing to resume: the run before was stopped before its first step"]
    for note in (*cleared.notes, *resumed):
        metrics.say(note)
    run = Run(config, plan, data, engine, checkpoints, metrics, ranks, step, name, requests, watchdog)
    run.peak_flops = peak_flops(config, ranks.device)
    run.validated = ranks.on_first(lambda: _validated(run))
    run.validated_step = 0 if run.validated is None else step
    return run


def _deferred(config: Config) -> nn.Module:
    model = deferred_model(config.model, config.sequence_length, config.attention)
    configure_compute(model, config)
    return model


def _checkpoint_due(run: Run) -> bool:
    config = run.config
    if run.step == config.last_step:
        return bool(config.checkpoint_every or config.stop_after)
    return bool(config.checkpoint_every) and run.step % config.checkpoint_every == 0


def _validation_due(run: Run) -> bool:
    config, step = run.config, run.step
    due = step == config.steps or (config.eval_every and step % config.eval_every == 0)
    return bool(due and step > run.validated_step)


def validate(run: Run) -> None:
    """Evaluate and log; all of the validation data (or ``final_eval_sequences``) after the last step; collective.

    Given up where the run is asked to stop: it is due again when the run is resumed.
    """

    def go_on() -> bool:
        run.watchdog.mark(task, SLOW)
        return run.go_on()

    config = run.config
    task = f"the validation after step {run.step}"
    run.watchdog.mark(task, SLOW)
    sequences = config.final_eval_sequences if run.step == config.steps else config.eval_sequences
    windows, micro, ratio = run.data.validation, run.plan.micro, run.data.bytes_per_token
    result = evaluate(run.engine, windows, micro, run.ranks, sequences, ratio, go_on)
    if result is None:
        return
    run.validated, run.validated_step = result, run.step
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


def _agree(facts: dict[str, object]) -> None:
    with alike():
        check_same_on_all_ranks(facts)


def _validated(run: Run) -> Evaluation | None:
    """The validation of the step that a run is resumed at, if it stands in the metrics."""
    for row in reversed(run.metrics.rows):
        if row["step"] == run.step and "validation_loss" in row:
            return Evaluation(row["validation_loss"], row["validation_tokens"], run.data.bytes_per_token)
    return None
