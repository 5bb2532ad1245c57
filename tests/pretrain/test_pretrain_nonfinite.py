"""A batch with gradients that are not finite on one rank: the trainer leaves that step out under every engine."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_dist.pretrain import llama, step, train
from apollo_dist.pretrain.distributed import Ranks, SetupError
from apollo_dist.pretrain.optimizers import local
from apollo_dist.pretrain.run import Run
from apollo_dist.pretrain.settings import load_settings

from ..engines import full_weights, zero_config
from ..pretrain_runs import SMALL, SMALL_APOLLO, write_text
from ..ranks import run_ranks

BF16 = {"bf16": {"enabled": True}}
JSON = {
    "zero0": zero_config(0),
    "zero1": zero_config(1),
    "zero2": zero_config(2),
    "zero3": zero_config(3),
    "zero2_bf16": zero_config(2, **BF16),
    "bf16_optimizer": zero_config(1, **BF16, data_types={"grad_accum_dtype": "fp32"}),
}
BAD = 2  # the step, from 0, whose loss is not finite on the last rank


def spoil(losses: Callable[..., Tensor], when: Callable[[], bool]) -> Callable[..., Tensor]:
    def spoiled(*arguments: Any) -> Tensor:
        loss = losses(*arguments)
        return loss * math.nan if when() else loss

    return spoiled


def weights(run: Run) -> Tensor:
    engine: Any = getattr(run.engine, "_engine", None)
    if engine is not None:
        return torch.cat([w.flatten() for w in full_weights(engine, engine.module).values()])
    model: Any = run.engine
    return torch.cat([local(p).detach().flatten() for p in model.module.parameters()])


def one_engine(name: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    chosen = [f"--engine={name}"]
    if name in JSON:
        chosen = ["--engine=deepspeed", f"--deepspeed_config={folder / name}.json"]
    own = SMALL_APOLLO
    arguments = [*SMALL, *own, *chosen, f"--data={folder / 'text'}", f"--output={folder / name}_run"]
    run = train.set_up(load_settings([*arguments, "--max_skipped_steps=1"]), Ranks(rank, world, torch.device("cpu")))
    bad = {BAD, BAD + 2, BAD + 3}
    original = llama.token_losses
    llama.token_losses = spoil(original, lambda: rank == world - 1 and run.step in bad)
    found: dict[str, Any] = {"moved": [], "error": "none", "lr": []}
    try:
        for _ in range(BAD + 4):
            before = weights(run)
            found["lr"].append(run.engine.optimizer.param_groups[0]["lr"])
            step.train_step(run)
            after = weights(run)
            assert torch.isfinite(after).all()
            found["moved"].append(not torch.equal(before, after))
    except SetupError as error:
        found["error"] = str(error)
        found["same after the error"] = torch.equal(before, weights(run))
    finally:
        llama.token_losses = original
    return found


def all_engines(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    torch.backends.mkldnn.set_flags(False)
    return {name: one_engine(name, rank, world, folder) for name in names}


@pytest.mark.slow
def test_the_step_is_left_out_on_every_rank(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    for name, config in JSON.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**config, "zero_allow_untested_optimizer": True}))
    names = ["ddp", "fsdp2", *JSON]
    results = run_ranks(all_engines, 2, tmp_path, names)
    for found in results:
        for name in names:
            one = found[name]
            assert one["moved"] == [True] * BAD + [False, True, False], name
            assert "gradients were not finite in 2 steps in a row, up to step 6 with loss nan" in one["error"], name
            assert one["same after the error"], name
            assert one["lr"] == pytest.approx(found["ddp"]["lr"]), name
