"""The known traps of APOLLO implementations, one test each, and the contract of a torch optimizer."""

import logging

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, APOLLOMini, param_groups
from apollo_dist.sharding.names import canonical_name

from ..models import gradients, relative_error
from ..reference import Reference


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5)).to(dtype)


def give(model, step, **only):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    given = gradients(shapes, step, 0)
    for name, p in model.named_parameters():
        p.grad = None if name in only.get("without", ()) else given[name].to(p.dtype)
    return {name: p.grad for name, p in model.named_parameters()}


def compare(model, optimizer, reference, steps, tolerance=1e-12, **only):
    for step in steps:
        grads = give(model, step, **only)
        optimizer.step()
        reference.step(grads)
    for name, p in model.named_parameters():
        assert relative_error(p.detach(), reference.weights[name]) < tolerance, name


RANKS = {"0.weight": 3, "1.weight": 3}


def test_identity_is_the_name_not_the_position():
    first, second = network(), network()
    a = APOLLO(first, rank=3)
    reordered = list(second.named_parameters())[::-1]
    b = APOLLO([{"params": [x for x in reordered if x[1].dim() == 2], "rank": 3},
                {"params": [x for x in reordered if x[1].dim() == 1]}])  # fmt: skip
    for step in range(4):
        give(first, step)
        give(second, step)
        a.step()
        b.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "wrapped",
    ["module.a.0.w", "_orig_mod.a.0.w", "module._orig_mod.module.a.0.w", "a._fsdp_wrapped_module.0.w",
     "a.0._checkpoint_wrapped_module.w", "a.0.w"],
)  # fmt: skip
def test_wrapper_prefixes_are_stripped(wrapped):
    assert canonical_name(wrapped) == "a.0.w"


def test_moments_of_bf16_weights_are_float32():
    model = network(torch.bfloat16)
    optimizer = APOLLO(model, rank=3)
    reference = Reference(dict(model.named_parameters()), RANKS, draw_dtype=torch.float32)
    give(model, 0)
    optimizer.step()
    moments = [s[key] for s in optimizer.named_state().values() for key in ("exp_avg", "exp_avg_sq")]
    assert {m.dtype for m in moments} == {torch.float32}
    # 0.999 v rounds back to v in bf16: with zero gradients it would never decay.
    before = optimizer.named_state()["0.weight"]["exp_avg_sq"].clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = optimizer.named_state()["0.weight"]["exp_avg_sq"]
    assert torch.allclose(after, before * 0.999, rtol=1e-6, atol=0)
    assert reference.weights.keys() == optimizer.named_state().keys()


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_zero_first_gradient_does_not_arm_the_limiter(scale_type):
    model = network()
    optimizer = APOLLO(model, rank=3, scale_type=scale_type)
    reference = Reference(dict(model.named_parameters()), RANKS, scale_type=scale_type)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = zeros[name]
    optimizer.step()
    reference.step(zeros)
    assert float(optimizer.named_state()["0.weight"]["last_norm"]) == 0.0
    before = model[0].weight.detach().clone()
    compare(model, optimizer, reference, [1])
    # An armed limiter would let the norm reach some 1e-8.
    assert float((model[0].weight.detach() - before).norm()) > 1e-3
    # A zero gradient later on leaves it armed as it was.
    for name, p in model.named_parameters():
        p.grad = zeros[name]
    last = float(optimizer.named_state()["0.weight"]["last_norm"])
    optimizer.step()
    reference.step(zeros)
    assert float(optimizer.named_state()["0.weight"]["last_norm"]) == last > 0
    compare(model, optimizer, reference, [2, 3])


def test_no_host_sync(monkeypatch):
    model = network()
    optimizer = APOLLO(model, rank=3)
    give(model, 0)
    optimizer.step()

    def refuse(*_):
        raise AssertionError("step() waited for the device")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy", "nonzero", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    give(model, 1)
    optimizer.step()


def test_projections_are_never_saved_and_caching_changes_nothing():
    results = []
    for cache in (True, False, "auto"):
        model = network()
        optimizer = APOLLO(model, rank=3, update_proj_gap=2, cache_projection=cache)
        for step in range(5):
            give(model, step)
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        for slot in optimizer.named_state().values():
            assert set(slot) <= {"step", "exp_avg", "exp_avg_sq", "last_norm", "held"}
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_never_silently_adamw():
    plain = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"no low-rank matrix found.*'rank': 256"):
        APOLLO(plain, rank=2)
    with pytest.raises(ValueError, match="no low-rank matrix"):
        APOLLO([nn.Parameter(torch.ones(3))], rank=2)
    with pytest.raises(ValueError, match="no low-rank matrix"):
        APOLLO([{"params": list(plain.named_parameters()), "lr": 0.1}], rank=2)


def test_one_log_line_says_what_is_what(caplog):
    model = network()
    optimizer = APOLLO(model, rank=3)
    with caplog.at_level(logging.INFO, logger="apollo_dist"):
        for step in range(3):
            give(model, step)
            optimizer.step()
    (line,) = [r.getMessage() for r in caplog.records]
    assert "2 matrices with 156 elements are low-rank (rank 3), 2 tensors with 17 elements take AdamW" in line
    assert "layout whole" in line
    assert "0 shared channels; this rank sends 0 bytes a step" in line


def test_resume_is_exact_and_keeps_dtypes(tmp_path):
    straight, stopped = network(torch.bfloat16), network(torch.bfloat16)
    a, b = APOLLO(straight, rank=3, update_proj_gap=3), APOLLO(stopped, rank=3, update_proj_gap=3)
    for step in range(4):
        give(straight, step)
        give(stopped, step)
        a.step()
        b.step()
    torch.save({"model": stopped.state_dict(), "optimizer": b.state_dict()}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    resumed = network(torch.bfloat16)
    resumed.load_state_dict(saved["model"])
    c = APOLLO(resumed, rank=3, update_proj_gap=3)
    c.load_state_dict(saved["optimizer"])
    for step in range(4, 9):
        give(straight, step)
        give(resumed, step)
        a.step()
        c.step()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    for name, slot in c.state_dict()["state"].items():
        assert slot["exp_avg"].dtype == torch.float32
        assert torch.equal(slot["exp_avg"], a.state_dict()["state"][name]["exp_avg"])


def test_missing_gradients_are_skipped():
    model = network()
    optimizer = APOLLO(model, rank=3, weight_decay=0.1)
    reference = Reference(dict(model.named_parameters()), RANKS, weight_decay=0.1)
    compare(model, optimizer, reference, [0, 1])
    compare(model, optimizer, reference, [2, 3], without=("0.weight", "1.bias"))
    compare(model, optimizer, reference, [4, 5], without=("1.weight",))
    compare(model, optimizer, reference, [6])


def test_weights_that_are_not_contiguous():
    model = network()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert not model[0].weight.is_contiguous()
    reference = Reference(dict(model.named_parameters()), RANKS)
    compare(model, APOLLO(model, rank=3), reference, range(4))


def test_mini_is_rank_one_tensor_128():
    model = network()
    reference = Reference(
        dict(model.named_parameters()), dict.fromkeys(RANKS, 1), scale_type="tensor", scale=128.0, lr=1e-3
    )
    compare(model, APOLLOMini(model, lr=1e-3), reference, range(4))


def test_scale_front_gives_the_same_result():
    model = network()
    reference = Reference(dict(model.named_parameters()), RANKS, scale=4.0)
    compare(model, APOLLO(model, rank=3, scale=4.0, scale_front=True), reference, range(4))


def test_adamw_is_torch_adamw_up_to_the_place_of_eps():
    torch.manual_seed(0)
    ours, theirs = [nn.Parameter(torch.randn(7, dtype=torch.float64)) for _ in range(2)]
    theirs.data.copy_(ours.data)
    other = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    a = APOLLO([{"params": [other], "rank": 2}, {"params": [ours]}], lr=1e-3, eps=1e-30)
    b = torch.optim.AdamW([theirs], lr=1e-3, eps=1e-30, weight_decay=0.0)
    for _ in range(5):
        ours.grad = torch.randn(7, dtype=torch.float64)
        theirs.grad, other.grad = ours.grad.clone(), torch.randn_like(other)
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)


def test_low_rank_choice_in_a_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    low, rest = param_groups(model, rank=4)
    assert len(low["params"]) == 2 * 7
    assert all(name.endswith("_proj.weight") for name, _ in low["params"])
    names = {name for name, _ in rest["params"]}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= names
    low, _ = param_groups(model, rank=4, exclude=r"self_attn")
    assert len(low["params"]) == 2 * 3


def test_scheduler_and_closure():
    model = network()
    optimizer = APOLLO(model, rank=3, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    give(model, 0)
    assert optimizer.step(lambda: 7.0) == 7.0
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05]


def test_state_bytes_follow_the_formula():
    model = network(torch.float32)
    optimizer = APOLLO(model, rank=3)
    assert optimizer.state_bytes() == 0
    give(model, 0)
    optimizer.step()
    # Two moments of (channels, rank) and one norm for each matrix; two moments for each bias.
    assert optimizer.state_bytes() == 4 * (2 * 3 * (12 + 12) + 2 + 2 * (12 + 5))


def test_new_group_dictionaries_are_followed():
    """Tools may replace ``param_groups`` by copies; the step reads the ones that are there."""
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = APOLLO([{"params": [weight], "rank": 2}], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    optimizer.step()
    assert torch.equal(weight, before)
