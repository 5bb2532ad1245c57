"""What a run was started with, kept in OUTPUT/config: enough to start it again, and to see what changed in between.

The first start writes into ``config`` itself, each later one into ``config/start-2``, ``config/start-3``, ...
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from apollo_dist.pretrain.stop import write_whole
from apollo_dist.pretrain.versions import node, revision, versions

if TYPE_CHECKING:
    from apollo_dist.pretrain.batching import BatchPlan
    from apollo_dist.pretrain.config import Config
    from apollo_dist.pretrain.distributed import Ranks
    from apollo_dist.pretrain.engines.deepspeed_json import DeepSpeedJson
    from apollo_dist.pretrain.override import Change
    from apollo_dist.pretrain.settings import Settings

FOLDER = "config"
# Of the launchers' variables, those that say what ran where; others may hold secrets.
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_ACCOUNT", "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT",
    "SLURM_SUBMIT_DIR", "SLURM_CLUSTER_NAME",
)  # fmt: skip


def snapshot(
    settings: Settings,
    config: Config,
    json_: DeepSpeedJson | None,
    plan: BatchPlan,
    ranks: Ranks,
    step: int,
    overridden: Sequence[Change] = (),
) -> None:
    """Write recipe, DeepSpeed's JSON, command and environment of this start; collective.

    What the start changed of the checkpoint's values is in the environment: key, value before, value now.

    Raises SetupError on every rank if they cannot be written.
    """
    nodes = ranks.gather(node())
    started = {"step": step, "overridden": {each.key: [each.was, each.now] for each in overridden}}
    ranks.on_first(lambda: _write(settings, config, json_, plan, nodes, started))


def _write(
    settings: Settings,
    config: Config,
    json_: DeepSpeedJson | None,
    plan: BatchPlan,
    nodes: list[str],
    started: dict[str, Any],
) -> None:
    folder = next_folder(config.output_folder / FOLDER)
    environment = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **started,
        "ranks": len(nodes),
        "nodes": {name: nodes.count(name) for name in dict.fromkeys(nodes)},
        "versions": versions(),
        "repository": revision(),
        "variables": {key: os.environ[key] for key in (*LAUNCH, *SLURM) if key in os.environ},
    }
    command = f"cd {shlex.quote(os.getcwd())}\n{shlex.join(sys.orig_argv)}\n"
    if json_ is not None:
        write_whole(folder / "deepspeed.json", json.dumps(json_.complete(config, plan), indent=2) + "\n")
    write_whole(folder / "command.txt", command)
    write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    write_whole(folder / "recipe.yaml", recipe_text(settings.config))


def next_folder(root: Path) -> Path:
    """``root`` for the first start, then ``start-2`` and so on inside it."""
    if not (root / "recipe.yaml").exists():
        return root
    number = 2
    while (root / f"start-{number}").exists():
        number += 1
    return root / f"start-{number}"


def recipe_text(config: Config) -> str:
    """``config`` as a recipe: with ``--recipe`` it makes the same run, but for what DeepSpeed's JSON decides."""
    values: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    name = values.pop("recipe")
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in values.pop("optimizer").items()}
    del values["resume"], values["output"], values["override"]
    if values["deepspeed_config"] is not None:
        values["deepspeed_config"] = os.path.abspath(values["deepspeed_config"])
    values |= {"optimizer": config.optimizer.name, "optimizers": {config.optimizer.name: options}}
    head = f"# Recipe {name}, with all defaults and the command line laid over it.\n"
    return head + yaml.safe_dump(values, sort_keys=False)
