"""Runs with ``TrainingArguments(optim="apollo_adamw")``, on two gloo ranks, for two files of tests.

``test_hugging_face_fsdp.py`` runs those under DDP and FSDP, ``test_by_name.py`` those under DeepSpeed,
in the ranks that they have in any case. A run returns each weight's error against one process with whole matrices, or
the message of the error that was expected.
"""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from torch import nn

import apollo_dist

from ..llama import GAP, RANK, RATE, STAGES, dense, errors, llama, whole_batches
from ..versions import APOLLO_NAMES, LABELS, deepspeed_runs
from .blocks import accelerate_on_cpu, dataset, resumes_exactly, run_documented, watched, whole_weights, with_fsdp

LINEAR = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]  # the Trainer's schedule: two steps up, four down
MINI = f"rank=1, scale=4.0, scale_type=tensor, update_proj_gap={GAP}"
PLAIN = f"rank={RANK}, update_proj_gap={GAP}"
BLOCKS = ["self_attn", "mlp"]
CONFIGURED = {"accelerator_config": {"use_configured_state": True}}  # the state that ``deepspeed_on_cpu`` made


def named(model: nn.Module, optim: str = "apollo_adamw", optim_args: str = PLAIN, targets: Any = None, **settings: Any):
    """A Trainer that builds its optimizer by name."""
    from transformers import Trainer, TrainingArguments

    arguments = {
        "output_dir": tempfile.mkdtemp(), "save_strategy": "no", "max_steps": 6, "per_device_train_batch_size": 2,
        "learning_rate": RATE, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1,
        "adam_beta2": 0.99, "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "report_to": [], "logging_strategy": "no",
        "disable_tqdm": True, **settings,
    }  # fmt: skip
    arguments |= {"optim": optim, "optim_args": optim_args, "optim_target_modules": targets or BLOCKS}
    made = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=dataset())
    made.model_accepts_loss_kwargs = False  # transformers 4 divides the sum of losses by how many labels are unshifted
    return made


def decay(name: str) -> float:
    """What the documentation of ``weight_decay=0.1`` promises."""
    return 0.0 if "norm" in name else 0.1


def torch_run(fsdp: dict[str, Any] | None, *given: Any, adamw: str = "nothing", **options: Any) -> dict[str, float]:
    """A run without DeepSpeed; without a config for FSDP it takes DDP. ``options`` are the reference's."""
    model = llama()
    with accelerate_on_cpu(fsdp), watched(model) as watch:
        running = named(model, *given, **with_fsdp(fsdp))
        running.train()
        assert isinstance(watch.optimizer, apollo_dist.APOLLO)
        assert getattr(watch.optimizer, "updates_in_backward", False) == (given[:1] == ("apollo_adamw_layerwise",))
        return watch.errors(running.model, betas=(0.9, 0.99), decay=decay, adamw=lambda name: adamw in name, **options)


def documented_run() -> dict[str, float]:
    """The page's block, with its epsilon."""
    model = llama()
    with accelerate_on_cpu(), watched(model) as watch:
        found = run_documented("Trainer, by name", model=model, dataset=dataset(), folder=tempfile.mkdtemp())
        assert len(set(watch.rates)) == 6
        return watch.errors(found["trainer"].model, decay=decay, eps=1e-8, factor=LABELS)


def torch_cases() -> dict[str, dict[str, float]]:
    fsdp1 = {"version": 1, "sync_module_states": False}
    layerwise = ("apollo_adamw_layerwise",)
    found = {"DDP": torch_run(None), "FSDP1": torch_run(fsdp1)}
    return {
        **found,
        "FSDP2": torch_run({"version": 2}),
        "FSDP2, as documented": documented_run(),
        "FSDP2, regular expression": torch_run(
            {"version": 2}, "apollo_adamw", PLAIN, r".*\.(q|k|v|o|gate|up)_proj", adamw="down_proj"
        ),
        "FSDP2, Mini": torch_run({"version": 2}, "apollo_adamw", MINI, rank=1, scale=4.0, scale_type="tensor"),
        "FSDP2, layerwise": torch_run({"version": 2}, *layerwise),
    }


def refused(**settings: Any) -> str:
    """What a run that cannot be is told."""
    try:
        named(llama(), "apollo_adamw_layerwise", **settings).train()
    except ValueError as error:
        return str(error)
    return "no error"


def torch_refused() -> dict[str, str]:
    found = {}
    with accelerate_on_cpu(None):
        found["DDP"] = refused()
    fsdp1 = {"version": 1, "sync_module_states": False}
    with accelerate_on_cpu(fsdp1):
        found["FSDP1"] = refused(fsdp=True, fsdp_config=fsdp1)
    return found


def torch_resumed(fsdp: dict[str, Any] | None, *given: Any) -> bool:
    """Whether the Trainer's own checkpoint resumes exactly."""
    return resumes_exactly(
        lambda: accelerate_on_cpu(fsdp),
        lambda **settings: named(llama(), *given, **with_fsdp(fsdp), **settings),
        whole_weights,
    )


def by_torch() -> dict[str, Any]:
    """Everything without DeepSpeed; nothing where transformers does not know the names."""
    if not APOLLO_NAMES:
        return {}
    return {
        "cases": torch_cases(),
        "refused": torch_refused(),
        "resumed": {name: torch_resumed({"version": 2}, name) for name in ("apollo_adamw", "apollo_adamw_layerwise")},
    }


def deepspeed_run(config: dict[str, Any], optim_args: str = PLAIN, **options: Any) -> dict[str, float]:
    """A run under DeepSpeed, whose JSON names no optimizer."""
    from ..engines import deepspeed_on_cpu

    model = llama()
    with deepspeed_on_cpu(), watched(model) as watch:
        running = named(model, "apollo_adamw", optim_args, deepspeed=config, **CONFIGURED)
        running.train()
        assert type(running.deepspeed.basic_optimizer) is apollo_dist.APOLLO
        # A step has one call of ours, or under ZeRO one for each of three groups.
        rates = watch.rates[:: len(watch.rates) // 6]
        assert rates == pytest.approx([RATE * part for part in LINEAR])
        expected = dense(whole_batches(watch.batches[:6]), rates, betas=(0.9, 0.99), decay=decay, **options)
        return errors(running.model, expected)


def by_deepspeed(config_of: Any, offloaded: Any) -> dict[str, Any]:
    """Everything under DeepSpeed that the installed versions can do.

    Args:
        config_of: a configuration of a stage, with changes.
        offloaded: the same configuration with the optimizer on the CPU.
    """
    from ..engines import deepspeed_on_cpu

    if not APOLLO_NAMES:
        return {}
    stages = {stage: config_of(stage, optimizer=None) for stage in STAGES}
    stages = {stage: config for stage, config in stages.items() if deepspeed_runs(config, 2)}
    cases = {f"ZeRO-{stage}": deepspeed_run(config) for stage, config in stages.items()}
    if 2 in stages:
        cases["Mini, ZeRO-2"] = deepspeed_run(
            config_of(2, optimizer=None), MINI, rank=1, scale=4.0, scale_type="tensor"
        )
    cases["ZeRO-3 with offload"] = deepspeed_run(
        offloaded(config_of(3, optimizer=None, zero_force_ds_cpu_optimizer=False))
    )
    found: dict[str, Any] = {"cases": cases}
    adamw = config_of(2, optimizer={"type": "AdamW", "params": {"lr": RATE}})
    with deepspeed_on_cpu():
        found["layerwise"] = refused(deepspeed=config_of(2, optimizer=None), **CONFIGURED)
    with deepspeed_on_cpu():
        try:
            named(llama(), deepspeed=adamw, **CONFIGURED).train()
            found["another optimizer"] = "no error"
        except ValueError as error:
            found["another optimizer"] = str(error)
    return found
