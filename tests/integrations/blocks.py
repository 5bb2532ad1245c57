"""What the runs under Hugging Face's and Lightning's tools share: their set-up on CPU, and the comparison."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from apollo_dist.optimizers.base import ShardedOptimizer
from apollo_dist.sharding.names import canonical_name

from ..llama import GAP, RANK, STEPS, dense, tokens, whole_batches
from ..models import relative_error
from ..versions import TRANSFORMERS

FSDP2: Mapping[str, Any] = {"version": 2}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def with_fsdp(config: dict[str, Any] | None) -> dict[str, Any]:
    """What ``TrainingArguments`` needs for FSDP; nothing without it, for transformers 4.57 takes no ``fsdp=False``."""
    return {} if config is None else {"fsdp": True, "fsdp_config": config}


@contextmanager
def accelerate_on_cpu(fsdp: Mapping[str, Any] | None = FSDP2) -> Iterator[None]:
    """Accelerate on CPU. For FSDP it takes the group for one of GPUs: on CPUs it ignores FSDP, and takes DDP.

    Args:
        fsdp: the Trainer's ``fsdp_config``, of which transformers 4 does not read the version; None for DDP.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    kind = DistributedType.MULTI_CPU if fsdp is None else DistributedType.MULTI_GPU
    backend = mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", kind))
    environment = {"ACCELERATE_TORCH_DEVICE": "cpu"}
    if TRANSFORMERS < (5,) and fsdp is not None:
        environment["FSDP_VERSION"] = str(fsdp["version"])  # as accelerate's launcher
    device = mock.patch.dict(os.environ, environment)
    try:
        with backend, device:
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def dataset(rows: int = 64) -> list[dict[str, Tensor]]:
    """Samples as a causal language model takes them.

    Rounding in fp32 gradients, 1e-7, becomes 1e-5 in the first step where an entry of R is nearly zero beside its
    channel's gradient, and epsilon is that of ``TrainingArguments``, 1e-8: another seed had one of 6e-5 of it. Of these
    rows and the first projections of a ``llama`` none is below 2e-3.
    """
    return [{"input_ids": row, "labels": row} for row in tokens(0, 104, rows=rows)]


class Watch:
    """What a training run did: token ids of this rank's batches, learning rates, the optimizer."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.rates: list[float] = []
        self.optimizer: Any = None

    def errors(self, model: nn.Module, prefix: str = "", **options: Any) -> dict[str, float]:
        """Each weight's error against one process; ``options`` as in ``dense``, ``prefix`` of the model's names."""
        assert len(self.rates) == STEPS, self.rates
        expected = dense(whole_batches(self.batches[:STEPS]), self.rates, prefix=prefix, **options)
        found = whole_weights(model)
        assert found.keys() == expected.keys()
        return {name: relative_error(found[name], expected[name]) for name in found}


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Watch a ``llama`` train with an optimizer of the library, whoever makes and calls it."""
    watch = Watch()

    def before_step(optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, ShardedOptimizer):
            watch.optimizer = optimizer
            watch.rates.append(optimizer.param_groups[0]["lr"])

    def before_forward(_: nn.Module, __: Any, given: dict[str, Tensor]) -> None:
        watch.batches.append(given["input_ids"])

    hooks = (
        model.register_forward_pre_hook(before_forward, with_kwargs=True),
        register_optimizer_step_pre_hook(before_step),
    )
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights on every rank by canonical name, under DDP, FSDP1 and FSDP2."""
    with FullyShardedDataParallel.summon_full_params(model):
        return {
            canonical_name(name): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in model.named_parameters()
        }


def common_folder() -> str:
    """A new folder, the same on all ranks."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def lose_weights(model: nn.Module) -> None:
    """Zeros, so that what is loaded shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0)


def resumes_exactly(
    setup: Callable[[], AbstractContextManager[None]],
    make: Callable[..., Any],
    weights: Callable[[nn.Module], dict[str, Tensor]],
) -> bool:
    """Whether a Trainer that stops and is resumed from its own checkpoint ends with the bits of one that does not.

    Args:
        setup: what each run is in.
        make: a new Trainer with these training arguments.
        weights: whole ones of the trained model.
    """
    from transformers import TrainerCallback

    class StopAfterThree(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def run(folder: str, steps: int, resume: str | None = None) -> dict[str, Tensor]:
        with setup():
            running = make(output_dir=folder, save_strategy="steps", save_steps=3)
            if steps == 3:
                running.add_callback(StopAfterThree())
            if resume:
                lose_weights(running.model)
            running.train(resume_from_checkpoint=resume)
            assert running.state.global_step == steps
            return {name: weight.clone() for name, weight in weights(running.model).items()}

    want = run(common_folder(), STEPS)
    folder = common_folder()
    run(folder, 3)
    got = run(folder, STEPS, resume=f"{folder}/checkpoint-3")
    return all(torch.equal(got[name], weight) for name, weight in want.items())


def documented(title: str) -> str:
    """The Python block under a heading of ``docs/integrations.md``, with a rank that fits the small model."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{title}: {len(blocks)} blocks"
    # In the words of ``optim_args`` the gap stands beside the rank, elsewhere it comes with the options.
    code, count = re.subn(r'"rank=256, update_proj_gap=200', f'"rank={RANK}, update_proj_gap={GAP}', blocks[0])
    if not count:
        code, count = re.subn(r'(rank(?:=|": ))256', rf"\g<1>{RANK}, **options", blocks[0])
    assert count == 1
    return code


def run_documented(title: str, **names: Any) -> dict[str, Any]:
    """Run a block of the page among ``names``, with the tests' projection gap; returns the names that it left."""
    names = {"__name__": f"documented {title}", "options": {"update_proj_gap": GAP}, **names}
    exec(compile(documented(title), f"docs/integrations.md, {title}", "exec"), names)
    return names
