"""Which kernels a step takes: chosen by device and dtype when layouts are read, and told in the log."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from apollo_dist import APOLLO, SCALE, AdamW
from apollo_dist.kernels import table, trial

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("wanted", ["Triton", "cuda", None, True, ["torch"]])
def test_other_values_are_errors(wanted):
    with pytest.raises(ValueError, match=r'kernels must be "auto", "torch" or "triton", got'):
        APOLLO([nn.Parameter(torch.ones(3, 2))], rank=1, kernels=wanted)


def test_triton_that_is_not_installed_is_an_error_and_no_choice(monkeypatch):
    monkeypatch.setattr(table, "_installed", lambda: False)
    with pytest.raises(ValueError, match=r'kernels="triton" needs Triton, which is not installed'):
        APOLLO([nn.Parameter(torch.ones(3, 2))], rank=1, kernels="triton")
    assert table.choose("auto", torch.device("cuda"), torch.float32) is table.torch_kernels()


def test_auto_takes_triton_on_cuda_for_what_it_knows(monkeypatch):
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    monkeypatch.setattr(table, "works", lambda device: True)
    assert table.choose("auto", cuda, torch.float32).name == "triton"
    for given in (("auto", cuda, torch.float64), ("auto", CPU, torch.float32), ("torch", cuda, torch.float32)):
        assert table.choose(*given) is table.torch_kernels()
    assert table.choose("triton", cuda, torch.float32, known=False) is table.torch_kernels()


def test_a_trial_of_each_kernel_agrees_with_torch():
    pytest.importorskip("triton")
    assert trial.failure(DEVICE) is None


@pytest.mark.parametrize("name", ["draw", "draw_signs", "project", "moments", "add_up", "apply", "apply_rows", "adamw"])
def test_auto_does_without_kernels_that_fail_their_trial(name, monkeypatch, caplog):
    triton = pytest.importorskip("apollo_dist.kernels.triton")
    original = getattr(triton, name)

    def wrong(*given, **options):
        original(*given, **options)
        written = {"draw": 2, "draw_signs": 1, "project": 2, "moments": 0, "add_up": 1}
        tensor = given[written[name]] if name in written else given[0][0][0]
        tensor.view(-1)[-1] += 1

    def broken(*given, **options):
        raise RuntimeError("ptxas exited with 1")

    for kernel, reason in (
        (wrong, f"{name.removesuffix('_signs')}.* differs from torch's"),
        (broken, "RuntimeError: ptxas"),
    ):
        monkeypatch.setattr(triton, name, kernel)
        table.works.cache_clear()
        caplog.clear()
        try:
            for _ in range(2):
                assert not table.works(DEVICE)
        finally:
            table.works.cache_clear()
        assert len(caplog.messages) == 1
        assert re.search(f"Triton's kernels do not work on {DEVICE}.*torch's operations.*{reason}", caplog.text)
    monkeypatch.setattr(table, "works", lambda device: False)
    assert table.choose("auto", torch.device("cuda"), torch.float32) is table.torch_kernels()


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(table, "_interpreted", lambda: False)
    monkeypatch.setattr(table, "_installed", lambda: True)
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = APOLLO([weight], rank=1, kernels="triton")
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 to try the kernels in Triton's interpreter"):
        optimizer.step()
    assert bool((weight == 1).all())


def test_the_first_step_tells(caplog):
    pytest.importorskip("triton")
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3).double()})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    groups = [{"params": list(layer.named_parameters(name)), "rank": 2} for name, layer in model.items()]
    for group in groups:
        group["params"] = [(name, p) for name, p in group["params"] if p.ndim == 2]
    for kernels, told in (
        ("auto", "kernels: torch"),
        ("triton", "kernels: torch for 1 of this rank's parameters, triton for 1 of this rank's parameters"),
    ):
        caplog.clear()
        with caplog.at_level("INFO", "apollo_dist"):
            APOLLO([dict(group) for group in groups], kernels=kernels).step()
        assert told in caplog.text


def test_adamw_in_either_form_takes_the_kernel_and_the_torch_codes_step():
    """With a large epsilon, which the two forms have on different sides of the bias correction."""
    pytest.importorskip("triton")

    def steps(cls, kernels, **options):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 4)]), "norm": nn.LayerNorm(4)})
        optimizer = cls(model, lr=1e-2, weight_decay=0.1, eps=1e-2, kernels=kernels, **options)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        used = {t.kernels.name for plan in optimizer._parts.plans.built.values() for t in plan.elementwise}
        return used, [p.detach() for p in model.parameters()]

    for cls, options in ((AdamW, {}), (SCALE, {"adam_lr": 3e-3}), (APOLLO, {"rank": 2})):
        _, want = steps(cls, "torch", **options)
        used, got = steps(cls, "triton", **options)
        assert used == {"triton"}
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
