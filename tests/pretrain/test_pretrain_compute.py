"""Options of how passes are computed: the losses of the plain run to rounding, and one host sync in a step."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_dist.planning.activations import liger_chunk
from apollo_dist.pretrain import liger
from apollo_dist.pretrain.compute import check_compute
from apollo_dist.pretrain.config import ModelConfig
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.metrics import Metrics, read_rows
from apollo_dist.pretrain.run import Run
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.pretrain.step import train_step
from apollo_dist.pretrain.train import set_up, validate
from apollo_dist.pretrain.utilization import flops_per_token, utilization

from ..pretrain_runs import SMALL, SMALL_APOLLO, ZERO2, losses, validations, write_text
from ..ranks import run_ranks

STEPS = 4
CHUNKED = ["--loss=chunked", "--loss_chunk=5"]  # of the 32 tokens of a micro-batch, the last with 2
OPTIONS = {
    "plain": [],
    "full": ["--activation_checkpointing=full"],
    "selective": ["--activation_checkpointing=selective"],
    "chunked": CHUNKED,
    "eager": ["--attention=eager"],
    "together": ["--activation_checkpointing=selective", "--attention=eager", *CHUNKED],
}
COMPILED = {
    "plain": [],
    "compile": ["--compile"],
    "all": ["--compile", "--activation_checkpointing=selective", *CHUNKED],
}
# Of docs/claims.md, with a tiny model: what else they say is what a user starts.
RECIPES = [("13B-DDP", "APOLLOMini"), ("7B-throughput", "APOLLO", "--optimizer.rank=4")]
ENGINES = ["zero2", "fsdp2", "ddp", "fsdp1", "zero3"]


def begun(rank: int, world: int, folder: Path, name: str, engine: str, *options: str) -> Run:
    chosen = [f"--engine={engine}"]
    if engine.startswith("zero"):
        chosen = ["--engine=deepspeed", f"--deepspeed_config={folder / engine}.json"]
    more = [
        f"--data={folder / 'text'}",
        f"--output={folder / engine / name}",
        "--micro_batch_size=1",
        "--peak_tflops=2",
    ]
    return set_up(load_settings([*SMALL, *SMALL_APOLLO, *chosen, *more, *options]), Ranks(rank, world, CPU))


CPU = torch.device("cpu")


def rank_main(rank: int, world: int, folder: Path, cases: dict[str, dict[str, list[str]]]) -> None:
    for engine, options in cases.items():
        for name, chosen in options.items():
            run = begun(rank, world, folder, name, engine, *chosen)
            for _ in range(STEPS):
                train_step(run)
            validate(run)
    if "ddp" in cases:
        pure(rank, world, folder)


def pure(rank: int, world: int, folder: Path) -> None:
    """Pure bf16, and the recipes that are in it, without oneDNN, which needs instructions that not every CPU has."""
    before = torch.backends.mkldnn.set_flags(False)
    for engine in ("ddp", "fsdp2", "fsdp1"):
        run = begun(rank, world, folder, "pure", engine, "--precision=bf16-pure")
        for _ in range(STEPS):
            train_step(run)
        assert all(p.dtype == torch.bfloat16 for p in run.engine.trained.parameters())
    for recipe, optimizer, *options in RECIPES:
        shape = [*SMALL, "--model.vocab_size=256", "--tokenizer=none", "--micro_batch_size=1", *options]
        place = [f"--data={folder / 'text'}", f"--output={folder / recipe}"]
        run = set_up(load_settings([f"--recipe={recipe}", *shape, *place]), Ranks(rank, world, CPU))
        for _ in range(2):
            train_step(run)
        assert (type(run.engine).__name__, run.optimizer_name) == ("DDP", optimizer)
        assert all(p.dtype == torch.bfloat16 for p in run.engine.trained.parameters())
    torch.backends.mkldnn.set_flags(*before)


def prepare(folder: Path) -> None:
    write_text(folder / "text")
    for stage in (2, 3):
        values = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        (folder / f"zero{stage}.json").write_text(json.dumps({**ZERO2, **values}))


def compare(folder: Path, engine: str, options: dict[str, list[str]]) -> None:
    """fp32, so 1e-5 relative: sums are taken in another order, and nothing else differs."""
    expected = losses(folder / engine / "plain")
    assert len(expected) == STEPS
    assert expected[1] != pytest.approx(expected[STEPS], rel=1e-4)
    for name in options:
        assert losses(folder / engine / name) == pytest.approx(expected, rel=1e-5), (engine, name)
        assert validations(folder / engine / name) == pytest.approx(validations(folder / engine / "plain"), rel=1e-5)


@pytest.mark.slow
def test_losses_are_those_of_the_plain_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    few = {name: OPTIONS[name] for name in ("plain", "together")}
    every = {engine: OPTIONS if engine in ("zero2", "fsdp2") else few for engine in ENGINES}
    run_ranks(rank_main, 2, tmp_path, every)
    for recipe, *_ in RECIPES:
        assert len(losses(tmp_path / recipe)) == 2
    for engine, options in every.items():
        compare(tmp_path, engine, options)
        if engine in ("ddp", "fsdp1", "fsdp2"):
            found = losses(tmp_path / engine / "pure")
            # bf16 has 8 bits: 0.4 % a rounding, of which a loss of some layers sees several.
            assert found == pytest.approx(losses(tmp_path / engine / "plain"), rel=0.02)
        row = read_rows(tmp_path / engine / "plain" / "metrics.jsonl")[0]
        assert row["peak_memory"] > 2**20 and row["tokens_per_s"] > 0
        config = load_settings([*SMALL, "--peak_tflops=2"]).config
        assert row["mfu"] == pytest.approx(utilization(config, row["tokens_per_s"], 2, 2e12))


@pytest.mark.slow
def test_losses_of_compiled_layers_are_those_of_the_plain_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    every = {"zero2": {name: COMPILED[name] for name in ("plain", "compile")}, "fsdp2": COMPILED}
    run_ranks(rank_main, 2, tmp_path, every)
    for engine, options in every.items():
        compare(tmp_path, engine, options)


class Watch(TorchDispatchMode):
    """Writes down whenever the host asks a tensor for its value."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._events.append("value")
        return func(*args, **(kwargs or {}))


def syncs(rank: int, world: int, folder: Path) -> dict[str, list[str]]:
    found = {}
    for engine in ("ddp", "fsdp2", "fsdp1"):
        for clip in ("0", "0.1"):
            run = begun(rank, world, folder, f"sync{clip}", engine, f"--gradient_clipping={clip}")
            train_step(run)  # the first makes plans
            train_step(run)  # DDP rebuilds its buckets
            events: list[str] = []
            backward, total = run.engine.backward, run.ranks.sum

            def launched(loss: torch.Tensor, backward: Any = backward, events: list[str] = events) -> None:
                backward(loss)
                events.append("backward")

            def summed(values: Any, total: Any = total, events: list[str] = events) -> list[float]:
                events.append("sum")
                return total(values)

            run.engine.backward = launched  # type: ignore[method-assign]
            object.__setattr__(run.ranks, "sum", summed)
            with Watch(events):
                train_step(run)
            found[f"{engine}, clip {clip}"] = events
    return found


def test_the_host_waits_once_and_after_the_last_backward_pass(tmp_path: Path) -> None:
    """Two micro-batches. `Ranks.sum` reads its result; nothing else reads a tensor's value."""
    prepare(tmp_path)
    for found in run_ranks(syncs, 2, tmp_path):
        for case, events in found.items():
            assert events == ["backward", "backward", "sum"], case


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--activation_checkpointing=half", "one of none, full, selective"),
        ("--attention=flash", "one of sdpa, flash_attention_2, eager"),
        ("--loss=fused", "one of plain, chunked, liger"),
        ("--loss_chunk=0", "loss_chunk is 0: it must be at least 1"),
        ("--peak_tflops=0", "peak_tflops is 0.0: it must be positive"),
    ],
)
def test_errors_name_the_key_and_the_value(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings([arguments])


def test_what_cannot_run_is_an_error_before_anything_is_built(tmp_path: Path) -> None:
    from apollo_dist.pretrain.resolve import resolve

    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="flash_attention_2 needs a GPU and the package flash-attn"):
            resolve(load_settings(["--attention=flash_attention_2", "--precision=bf16"]), 1)
    prepare(tmp_path)
    with pytest.raises(ValueError, match="--compile with ZeRO-3"):
        resolve(load_settings(["--compile", f"--deepspeed_config={tmp_path / 'zero3.json'}"]), 2)


def test_ligers_loss_is_refused_where_it_cannot_run_or_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_settings(["--loss=liger"]).config
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--loss liger needs a CUDA device and the package liger-kernel: pip"):
            check_compute(config, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs a CUDA device and the package"):
        check_compute(config, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(liger, "version", lambda name: "0.8.1")
    with pytest.raises(ValueError, match=r"liger-kernel 0\.8\.1: before 0\.8\.2 its gradients are wrong"):
        check_compute(config, None)
    monkeypatch.setattr(liger, "version", lambda name: "0.8.10.dev20261027")
    check_compute(config, None)


LIGER = """
import torch
from apollo_dist.pretrain.liger import liger_losses
from apollo_dist.pretrain.llama import Head

device = torch.device({device!r})
torch.manual_seed(0)
hidden = torch.randn(2, 7, 20, device=device, requires_grad=True)
targets, weights = torch.randint(53, (2, 7), device=device), torch.rand(2, 7, device=device)
head = Head(20, 53, bias=False, device=device)
found = []
for head.fused in (None, liger_losses):
    losses = head(hidden, targets)
    assert losses.dtype == torch.float32
    (losses * weights).sum().backward()
    found.append([losses.detach(), hidden.grad, head.weight.grad])
    hidden.grad = head.weight.grad = None
for plain, fused in zip(*found):
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
with torch.no_grad():
    torch.testing.assert_close(head(hidden, targets), found[0][0], rtol=1e-5, atol=1e-6)
"""


@pytest.mark.parametrize(
    "device",
    [
        "cpu",  # in Triton's interpreter, which is chosen before kernels are imported
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_ligers_losses_and_gradients_are_those_of_the_plain_head(device: str) -> None:
    env = {**os.environ, **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})}
    done = subprocess.run(
        [sys.executable, "-c", LIGER.format(device=device)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_planner_knows_ligers_chunks() -> None:
    model = load_settings(["--recipe=7B"]).config.model  # 32000 over 4096: 8 times as wide
    assert [liger_chunk(model, tokens) for tokens in (256, 4096, 4104)] == [32, 512, 1024]


def test_options_of_compute_may_change_when_a_run_resumes() -> None:
    from apollo_dist.pretrain.config import COMPUTE_KEYS, PLACE_KEYS

    assert set(COMPUTE_KEYS) <= PLACE_KEYS
    assert set(COMPUTE_KEYS) <= load_settings([]).config.computed().keys()  # which the ranks compare


def test_the_progress_bar_has_speed_utilization_and_memory(tmp_path: Path) -> None:
    metrics = Metrics(load_settings([f"--output={tmp_path}"]).config, True, 0)
    row = {"step": 1, "loss": 2.5, "lr": 0.01, "tokens": 64, "tokens_per_s": 12345.0, "elapsed": 0.1}
    metrics.train({**row, "mfu": 0.415, "peak_memory": 3 * 2**20})
    shown = metrics._bar.postfix
    metrics.close()
    assert shown == "loss=2.5000, tok/s=12,345, lr=1.00e-02, mfu=41.5%, mem=3MiB"
    assert read_rows(tmp_path / "metrics.jsonl")[0]["mfu"] == 0.415


def test_utilization_by_hand() -> None:
    model = ModelConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1)
    # A layer: q and o 4 x 4, k and v 2 x 4, three of 6 x 4; the head 10 x 4. Attention: 12 x 2 x 4 x 3.
    assert flops_per_token(model, 3) == 6 * (2 * (32 + 16 + 72) + 40) + 288
    config = load_settings(["--peak_tflops=2"]).config
    assert utilization(config, 1000.0, 4, 2e12) == flops_per_token(config.model, 256) * 1000.0 / 8e12
    assert utilization(config, 1000.0, 4, None) is None
