"""The planner's predictions against what real ranks hold, and its command line."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from apollo_dist.__main__ import main
from apollo_dist.planning import Options, forecast
from apollo_dist.planning.estimate import estimate
from apollo_dist.planning.fake import meta_model
from apollo_dist.planning.options import parse_bytes
from apollo_dist.pretrain.compute import configure_compute
from apollo_dist.pretrain.model import deferred_model
from apollo_dist.pretrain.settings import load_settings
from apollo_dist.weights.int8 import holds_int8

from ..ranks import run_ranks
from .planner_runs import RANK, TINY, measure

FP32 = {"precision": "fp32", "rank": RANK, "sequence_length": 8}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_predictions_are_what_ranks_hold(world: int) -> None:
    """Not within 5 %: equal, for four engines, on every rank, under APOLLO and AdamW."""
    measured = run_ranks(measure, world)
    for engine in measured[0]:
        predicted = forecast("tiny", TINY, Options(engine=engine, world=world, **FP32))
        for optimizer in ("apollo", "adamw"):
            ranks = predicted.ranks[optimizer]
            sent = predicted.exchange_bytes[optimizer]
            for k, found in enumerate(rank[engine][optimizer] for rank in measured):
                memory = ranks[k % len(ranks)]
                expected = {key: getattr(memory, key) for key in found if key != "sent"}
                if engine.startswith("zero") and optimizer == "adamw":
                    # The planner takes APOLLO's two parameter groups; AdamW's one group may be padded differently.
                    assert found.pop("masters") == pytest.approx(expected.pop("masters"), abs=2 * 4 * 2 * world)
                assert found == {**expected, "sent": sent[k % len(sent)]}, (world, engine, optimizer, k)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_real_layout_code_and_arithmetic_agree(world: int) -> None:
    """FSDP2 through a fake process group is what ``estimate`` says; HSDP is that within each shard group."""
    shapes = {name: tuple(p.shape) for name, p in meta_model(TINY).named_parameters()}
    arithmetic = estimate(shapes, RANK, world=world, layout="fsdp2")
    found = forecast("tiny", TINY, Options(engine="fsdp2", world=world, **FP32))
    assert tuple(m.state for m in found.ranks["apollo"]) == arithmetic.state_bytes
    assert found.exchange_bytes["apollo"] == arithmetic.exchange_bytes
    halved = forecast("tiny", TINY, Options(engine="fsdp2", world=world, adam_dtype="bfloat16", **FP32))
    arithmetic = estimate(shapes, RANK, world=world, layout="fsdp2", adam_dtype="bfloat16")
    assert tuple(m.state for m in halved.ranks["apollo"]) == arithmetic.state_bytes
    states = {kind: [forecast_.worst(kind)[1].state for forecast_ in (halved, found)] for kind in found.ranks}
    assert states["adamw"][0] * 2 == states["adamw"][1]
    same = {kind for kind, (now, before) in states.items() if now == before}
    assert same == {"adam-mini"}, states  # it has AdamW's moments of biases alone, and this model has none
    hybrid = Options(engine="hsdp", world=3 * world, gpus_per_node=world, **FP32)
    replicas = forecast("tiny", TINY, hybrid)
    assert replicas.ranks == found.ranks
    assert replicas.exchange_bytes == found.exchange_bytes
    assert not dist.is_initialized()


def test_a_process_group_that_exists_is_an_error_and_stays() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="already has one"):
            forecast("tiny", TINY, Options(engine="fsdp2", world=2, **FP32))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero3", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(engine: str, checkpointing: str) -> None:
    options = Options(engine=engine, world=2, gpu_memory=3_000_000, reserve=0, checkpointing=checkpointing, **FP32)
    most = forecast("tiny", TINY, options).largest_micro_batch("apollo")
    assert most > 1
    for micro, fits in ((most, True), (most + 1, False)):
        assert forecast("tiny", TINY, dataclasses.replace(options, micro_batch=micro)).fits("apollo") is fits
    assert forecast("tiny", TINY, dataclasses.replace(options, gpu_memory=1)).largest_micro_batch("apollo") == 0


def test_what_options_change() -> None:
    def of(**changes):
        return forecast("tiny", TINY, Options(**{"rank": RANK, "sequence_length": 8, **changes})).worst("apollo")[1]

    plain = of(engine="zero2", world=4)
    assert of(engine="zero2", world=4, gradient_dtype="fp32").gradients == 2 * plain.gradients
    moved = of(engine="zero2", world=4, offload="optimizer")
    assert (moved.masters, moved.state, moved.gradients) == (0, 0, 0)
    assert moved.host == plain.masters + plain.state + plain.gradients + plain.step_gradients
    assert moved.weights == plain.weights
    ddp = of(engine="ddp", world=4, precision="bf16-pure", bucket_view=False)
    assert (ddp.buckets, ddp.masters, ddp.weights) == (ddp.gradients, 0, ddp.gradients)
    assert of(engine="ddp", world=4, precision="bf16-pure").buckets == 0
    assert of(engine="fsdp2", world=2, layerwise=True).gradients * 2 < of(engine="fsdp2", world=2).gradients
    assert of(engine="ddp", world=1, layerwise=True).gradients == 4 * TINY.vocab_size * TINY.hidden_size


def test_int8_weights_are_those_of_the_trainer() -> None:
    pytest.importorskip("torchao")
    config = load_settings(["--weights=int8", "--precision=bf16-pure"]).config
    model = deferred_model(config.model, config.sequence_length)
    configure_compute(model, config)
    locals_of = [(p.int_data, p.scale) if holds_int8(p) else (p,) for p in model.parameters()]
    held = sum(tensor.numel() * tensor.itemsize for each in locals_of for tensor in each)
    options = Options(engine="ddp", world=1, precision="bf16-pure", weights="int8", rank=RANK)
    assert forecast("tiny", config.model, options).worst("apollo")[1].weights == held
    halves = dataclasses.replace(options, engine="fsdp2", world=2)
    assert forecast("tiny", config.model, halves).worst("apollo")[1].weights == held // 2


def test_command_writes_table_json_and_picture(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    files = {"--json": tmp_path / "plan.json", "--png": tmp_path / "plan.png"}
    given = "plan tiny --world 4 --gpus-per-node 2 --engine hsdp --gpu-memory 1GiB --reserve 0.1GB --rank 16".split()
    assert main([*given, *(str(word) for pair in files.items() for word in pair)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "hsdp on 4 ranks",
        "2 shards",
        "optimizer state",
        "largest micro-batch, with checkpointing",
        "rank 16",
    ):
        assert words in printed
    written = json.loads(files["--json"].read_text())
    assert written["shard_group_size"] == 2
    apollo, adamw = written["optimizers"]["apollo"], written["optimizers"]["adamw"]
    assert len(apollo["by_rank"]["state"]) == 2
    assert apollo["memory"]["state"] == max(apollo["by_rank"]["state"]) < adamw["memory"]["state"]
    assert files["--png"].read_bytes().startswith(b"\x89PNG")
    assert main([*given[:-4], "--gpu-memory", "10MB", "--reserve", "0.1MB"]) == 1


def test_without_matplotlib_a_line_says_so(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(["plan", "tiny", "--png", str(tmp_path / "plan.png"), "--engine", "ddp"])
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--engine zero4", "unknown engine 'zero4'; did you mean zero"),
        ("--world 12", "world 12 is not a multiple of gpus_per_node 8; the nearest is 16"),
        ("--world 0", "world must be at least 1, got 0"),
        ("--gpu-memory 80XB", "memory '80XB' is not understood; did you mean 80"),
        ("--gpu-memory much", "did you mean 80"),
        ("--engine hsdp --world 16 --shard-size 3", "world 16 is not a multiple of shard_size 3"),
        ("--shard-size 4", "shard_size is for engine hsdp"),
        ("--precision bf16-pure", "DeepSpeed keeps fp32 masters"),
        ("--weights int8", "in one process, DDP or FSDP2; got engine zero3"),
        ("--engine ddp --weights int4", "unknown weights 'int4'; did you mean int8"),
        ("--engine ddp --gradient-dtype fp32", "only ZeRO-1 to 3"),
        ("--engine zero3 --layerwise", "not zero3 on 8 ranks"),
        ("--engine ddp --layerwise", "not ddp on 8 ranks"),
        ("--engine fsdp2 --offload optimizer", "offload optimizer is ZeRO-1 to 3's"),
        ("--engine zero2 --offload all", "offload all needs zero3"),
        ("--no-bucket-view", "bucket_view is an option of DDP"),
        ("--rank 4000", "rank 4000 is larger than"),
        ("--scale-type row", "unknown scale type 'row'"),
        ("--reserve 90GB", "reserve must be less"),
    ],
)
def test_errors_name_the_value(arguments: str, message: str, capsys) -> None:
    assert main(["plan", "tiny", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_sizes() -> None:
    assert (parse_bytes("80GB"), parse_bytes("1.5 gib"), parse_bytes("512 B")) == (80 * 10**9, 3 * 2**29, 512)
    with pytest.raises(ValueError, match=r"'80 gigs'.*did you mean 80(GB|GiB)"):
        parse_bytes("80 gigs")
