"""Initial weights: what they are, and that every engine at every number of ranks has the same ones, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_dist.kernels.philox import philox_4x32_10, words_of
from apollo_dist.pretrain import initial
from apollo_dist.pretrain.batching import BatchPlan
from apollo_dist.pretrain.compute import configure_compute
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.engines import build_engine
from apollo_dist.pretrain.engines.deepspeed_json import reconcile
from apollo_dist.pretrain.initial import InitialWeights
from apollo_dist.pretrain.model import build_model, deferred_model
from apollo_dist.pretrain.settings import load_settings

from ..engines import prepare
from ..ranks import run_ranks

# Sides that do not divide by the ranks, and fewer rows than ranks in no matrix but few in those of keys and values.
SHAPE = (
    "--model.vocab_size=53 --model.hidden_size=20 --model.intermediate_size=27 --model.num_layers=2 "
    "--model.num_heads=10 --model.num_kv_heads=1 --sequence_length=8 --optimizer.rank=2 --seed=3"
).split()
ENGINES = ["ddp", "fsdp1", "fsdp1-none", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
# Of three ranks, in which precision weights are bf16.
BF16 = {"zero1": "bf16", "zero3": "bf16", "ddp": "bf16-pure", "fsdp1": "bf16-pure", "fsdp2": "bf16-pure"}


def arguments(engine: str, folder: Path, precision: str) -> list[str]:
    if engine.startswith("zero"):
        path = folder / f"{engine}-{precision}.json"
        values = {"zero_optimization": {"stage": int(engine[-1])}, "zero_allow_untested_optimizer": True}
        path.write_text(json.dumps({**values, "bf16": {"enabled": precision == "bf16"}}))
        return [*SHAPE, f"--deepspeed_config={path}"]
    name, _, strategy = engine.partition("-")
    return [*SHAPE, f"--engine={name}", f"--fsdp1_strategy={strategy or 'full'}", f"--precision={precision}"]


def weights(engine: str, wrapped) -> dict[str, Tensor]:
    """Whole weights on every rank, by their names in the bare model."""
    if engine.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(wrapped):
            named = wrapped.named_parameters()
            return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in named}
    if engine == "fsdp2":
        return {name: p.detach().full_tensor() for name, p in wrapped.named_parameters()}
    if engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(wrapped.parameters())):
            return {name.removeprefix("module."): p.detach().clone() for name, p in wrapped.named_parameters()}
    return {name.removeprefix("module."): p.detach().clone() for name, p in wrapped.named_parameters()}


class LargestCopy(TorchDispatchMode):
    """Keeps how many elements the largest result has that is a copy of several tensors."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.elements = max(self.elements, out.numel())
        return out


def rank_main(rank: int, world: int, folder: str) -> dict[str, dict[str, Tensor]]:
    prepare()
    ranks = Ranks(rank, world, torch.device("cpu"))
    found = {}
    cases = [(engine, "fp32") for engine in ENGINES] + [case for case in BF16.items() if world == 3]
    own = Path(folder) / str(rank)
    own.mkdir()
    for engine, precision in cases:
        config, json_ = reconcile(load_settings(arguments(engine, own, precision)), world)
        model = deferred_model(config.model, config.sequence_length)
        configure_compute(model, config)
        with LargestCopy() as copy:
            built = build_engine(config, json_, BatchPlan(world, 1, 1, world), model, ranks)
        # FSDP1 flattens the parameters of a unit, and would need the memory of the whole unit for it.
        assert not engine.startswith("fsdp1") or copy.elements < config.model.hidden_size, copy.elements
        found[f"{engine} {precision}"] = weights(engine, built.trained)
        frequencies = built.trained.get_buffer(_named(built.trained, "model.rotary_emb.inv_freq"))
        found[f"{engine} {precision}"]["inv_freq"] = frequencies.clone()
    return found


def _named(model, end: str) -> str:
    return next(name for name, _ in model.named_buffers() if name.replace("_fsdp_wrapped_module.", "").endswith(end))


@pytest.mark.parametrize("world", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_every_engine_begins_with_the_same_bits(world: int, tmp_path: Path) -> None:
    config = load_settings(SHAPE).config
    model = build_model(config.model, config.sequence_length, config.seed)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    expected["inv_freq"] = model.get_buffer("model.rotary_emb.inv_freq")
    assert expected["lm_head.weight"].std() > 0.01
    found = run_ranks(rank_main, world, str(tmp_path))
    for rank in found:
        for case, seen in rank.items():
            assert seen.keys() == expected.keys(), case
            for name, values in seen.items():
                wanted = expected[name] if name == "inv_freq" else expected[name].to(values.dtype)
                assert torch.equal(values, wanted), (case, name)
                if name != "inv_freq":
                    assert (values.dtype == torch.bfloat16) == (case.split()[1] != "fp32")


def whole(numel: int, seed: int = 0, name: str = "weight", std: float = 1.0) -> tuple[InitialWeights, Tensor]:
    layer = torch.nn.Linear(numel, 1, bias=False, device="meta")
    module = torch.nn.Module()
    setattr(module, name, layer)
    values = InitialWeights(module, seed, std)
    out = torch.empty(numel)
    values.fill(f"{name}.weight", out)
    return values, out


def test_any_part_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, normals = set(), initial._normals

    def watched(words, first, count, device):  # the same kernel calls for an element, whoever generates it
        calls.add((first, count))
        return normals(words, first, count, device)

    monkeypatch.setattr(initial, "_normals", watched)
    numel = 2 * initial.BLOCK + 1001
    values, out = whole(numel)
    for start, length in [(0, 7), (5, 64), (initial.BLOCK - 3, 9), (initial.BLOCK, 1), (numel - 5, 5), (99, 200_003)]:
        part = torch.empty(length)
        values.fill("weight.weight", part, start)
        assert torch.equal(part, out[start : start + length]), (start, length)
    assert calls == {(0, initial.BLOCK), (initial.BLOCK, initial.BLOCK), (2 * initial.BLOCK, 1001)}
    with pytest.raises(ValueError, match="are asked for"):
        values.fill("weight.weight", torch.empty(6), numel - 5)


def test_values_are_box_and_mullers_of_philoxs_words() -> None:
    """Against Python's own functions, to an fp32 rounding; the index of element 2 ** 35 needs two words."""
    _, out = whole(64, seed=7, name="a", std=0.5)
    words = words_of("apollo_dist initial weights\x007\0a.weight")
    for element in (0, 1, 2, 3, 41, 63):
        counter = (torch.tensor([element // 4]), torch.tensor([0]), torch.tensor([words[2]]), torch.tensor([words[3]]))
        random = [int(w) for w in philox_4x32_10(counter, (torch.tensor([words[0]]), torch.tensor([words[1]])))]
        pair = element % 4 // 2 * 2
        radius = math.sqrt(-2 * math.log((random[pair] + 1) / 2**32))
        turn = 2 * math.pi * random[pair + 1] / 2**32
        expected = 0.5 * radius * (math.sin(turn) if element % 2 else math.cos(turn))
        assert float(out[element]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    far = initial._normals(words, 2**35, 4, torch.device("cpu"))
    assert not torch.equal(far, initial._normals(words, 0, 4, torch.device("cpu")))


def test_values_are_normal_and_differ_by_seed_and_name() -> None:
    count = 400_000
    _, out = whole(count, std=0.02)
    x = out.double() / 0.02
    # Four standard errors of each moment's estimate.
    assert abs(float(x.mean())) < 4 / math.sqrt(count)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    assert abs(float((x[:-1] * x[1:]).mean())) < 4 / math.sqrt(count)
    assert not torch.equal(whole(100, seed=1)[1], out[:100])
    assert not torch.equal(whole(100, name="v")[1], whole(100)[1])


def test_a_module_of_another_kind_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="no initial values are known for weight of a Conv1d"):
        InitialWeights(torch.nn.Conv1d(1, 1, 1), 0, 0.02)
