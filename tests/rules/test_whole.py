"""Whole matrices at one owner: projections by SVD, and Muon. Traffic, failures, and gradients that say little."""

from __future__ import annotations

import pytest
import torch

from apollo_dist import Muon
from apollo_dist.planning.estimate import estimate_rule
from apollo_dist.projections.orthonormal import leading_directions

from ..models import gradients, llama_7b_shapes, relative_error, shapes_of
from ..ranks import run_ranks
from .problems import CASES, Llama
from .whole_runs import (
    degenerates,
    failures,
    in_either_dtype,
    leg,
    long_runs,
    many_rounds,
    nan_without_skipping,
    traffic,
)


@pytest.mark.parametrize("subspace", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("kind", ["random", "zero", "rank one", "equal", "nearly equal"])
def test_directions(kind, rank, subspace):
    """Orthonormal and finite for every gradient, with the sign that is promised; the SVD's where that is unique."""
    torch.manual_seed(0)
    G = {
        "random": torch.randn(9, 6).double(),
        "zero": torch.zeros(9, 6).double(),
        "rank one": torch.outer(torch.randn(9), torch.randn(6)).double(),
        "equal": torch.eye(9, 6).double(),
        "nearly equal": torch.eye(9, 6).double() * (1 + 1e-15 * torch.arange(6)),
    }[kind]
    torch.manual_seed(1)
    begin = torch.randn(6, 6).double()
    start = (lambda size: begin[:, :size]) if subspace else None
    found = leading_directions(G, rank, "w", start)
    assert found.shape == (6, rank)
    torch.testing.assert_close(found.T @ found, torch.eye(rank).double(), rtol=0, atol=1e-12)
    assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert torch.equal(found, leading_directions(G, rank, "w", start))
    if kind == "random":
        _, _, Vh = torch.linalg.svd(G)
        torch.testing.assert_close((Vh[:rank] @ found).abs(), torch.eye(rank).double(), rtol=0, atol=1e-12)


def test_directions_of_nan_say_which_matrix():
    with pytest.raises(RuntimeError, match=r"projection of w cannot be refreshed.*skip_nonfinite=True"):
        leading_directions(torch.full((4, 3), float("nan")), 2, "w")


@pytest.mark.parametrize("rule", ["GaLore", "Fira SVD", "APOLLO SVD", "Muon"])
def test_maximize(rule):
    """Following negated gradients is what it would be with those gradients, to rounding."""
    found = []
    for sign in (1.0, -1.0):
        model = Llama().double()
        shapes = shapes_of(model)
        optimizer = CASES[rule].make(model, lr=0.02, **CASES[rule].options, maximize=sign < 0)
        for step in range(4):
            for name, grad in gradients(shapes, step, 0).items():
                model.get_parameter(name).grad = sign * grad
            optimizer.step()
        found.append(dict(model.named_parameters()))
    assert all(relative_error(p.detach(), found[1][name].detach()) < 1e-12 for name, p in found[0].items())


@pytest.mark.parametrize("world", [2, 3])
def test_traffic_is_as_planned(world):
    for found in run_ranks(traffic, world):
        for rule, (counted, (collectives, sent, refresh)) in found.items():
            (first_calls, first), (calls, bytes_) = counted
            assert (calls, bytes_) == (collectives, sent), rule
            assert first == sent + refresh, rule
            assert (refresh > 0) == (first_calls > calls) == ("SVD" in rule), rule


def test_one_rank_failure_is_an_error_on_all():
    first, second = run_ranks(failures, 2)
    assert first[0] == second[0] == "skipped"
    assert "projection of" in second[1] and "did not converge" in second[1] and second[1].startswith("RuntimeError")
    assert first[1].startswith("RankError: rank 1: RuntimeError: the projection of")


def test_nan_in_a_refresh_is_an_error_on_all():
    for said in run_ranks(nan_without_skipping, 2):
        assert "cannot be refreshed" in said


def test_gradients_that_say_little():
    """No NaN, orthonormal projections, and the same on every rank."""
    each = run_ranks(degenerates, 2)
    for case, (weights, off, same) in each[0].items():
        assert off < 1e-12 and same, case
        for name, w in weights.items():
            assert torch.isfinite(w).all(), (case, name)
            assert torch.equal(w, each[1][case][0][name]), (case, name)


def test_iterations_in_bfloat16_are_the_same_however_matrices_travel():
    for auto, state in run_ranks(in_either_dtype, 3):
        assert auto.keys() == state.keys() and all(torch.equal(w, state[name]) for name, w in auto.items())


class Attention(torch.nn.Module):
    """Queries, keys and values of two heads of 4 rows, and of one head of 4 rows each: fused, or not."""

    head_dim = 4

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(16, 6).double()
        rows = {"qkv_proj": 16} if fused else {"q_proj": 8, "k_proj": 4, "v_proj": 4}
        for name, w in zip(rows, weight.split(list(rows.values())), strict=True):
            linear = torch.nn.Linear(6, len(w), bias=False).double()
            linear.weight.data.copy_(w)
            self.add_module(name, linear)


@pytest.mark.parametrize("split", ["head", (8, 4, 4)])
def test_fused_projections_in_blocks(split):
    """By head, or by matrix, as if nothing were fused; rho is that of the block."""
    found = []
    for fused in (True, False):
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"attn": Attention(fused)})])})
        given = split if fused or split == "head" else None
        optimizer = Muon(model, lr=0.02, split=given, ns_dtype="state", adjust_lr_fn="match_rms_adamw")
        for step in range(3):
            torch.manual_seed(step)
            grads = iter(torch.randn(16, 6).double().split([len(p) for p in model.parameters()]))
            for p in model.parameters():
                p.grad = next(grads).clone()
            optimizer.step()
        found.append(torch.cat([p.detach() for p in model.parameters()]))
    assert relative_error(*found) < 1e-12


def test_blocks_that_do_not_fit_are_errors():
    named = [("layers.0.q_proj.weight", torch.nn.Parameter(torch.ones(8, 4)))]
    for split, said in {0: "got 0", "heads": "got 'heads'"}.items():
        with pytest.raises(ValueError, match=said):
            Muon(named, split=split)
    for split, said in {(8, 4): "has 12 rows", "head": "how many rows a head"}.items():
        optimizer = Muon(named, split=split)
        named[0][1].grad = torch.ones(8, 4)
        with pytest.raises(ValueError, match=said):
            optimizer.step()


def test_rounds():
    """However many matrices an owner takes at once. float64: rounding in another order."""
    for errors in run_ranks(many_rounds, 3):
        assert max(errors.values()) < 1e-9, errors


@pytest.mark.slow
def test_25_steps(tmp_path):
    """float64: rounding in another order, by nine refreshes."""
    for errors in run_ranks(long_runs, 2, str(tmp_path)):
        assert max(errors.values()) < 1e-9, errors


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["GaLore SVD", "Fira SVD", "Muon"])
def test_checkpoints_across_engines_and_ranks(rule, tmp_path):
    """In the middle of a gap of 3 steps; float32: 6e-8 a step."""
    dense = None
    for number, (engine, world) in enumerate([("zero3", 4), ("fsdp2", 3), ("plain", 1), ("zero1", 2)]):
        steps = range(4 * number, 4 * number + 4)
        results = run_ranks(leg, world, rule, engine, str(tmp_path), steps, dense)
        dense = results[0][0]
        assert max(error for _, error in results) < 1e-5, (engine, [error for _, error in results])


def test_llama_7b():
    """The share of the gradients' traffic (bf16, a ring) that the busiest rank sends: as derived by hand, to 5 %."""
    shapes = llama_7b_shapes()
    expected = {
        ("galore", "fsdp2", 8): 0.0535,
        ("galore", "fsdp2", 64): 0.0134,  # both ways as elements
        ("galore", "zero3", 64): 0.0134,
        ("galore", "zero", 8): 0.0,
        # Fira's updates travel as one, with a norm and a scaling factor of each channel.
        ("fira", "fsdp2", 8): 0.0537,
        ("fira", "fsdp2", 64): 0.0134,
        ("fira", "zero", 8): 0.0,
        ("muon", "fsdp2", 8): 0.24,  # in bfloat16
        ("muon", "zero", 8): 0.0,
    }
    rest = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)}
    numel = sum(m * n for m, n in (shapes | rest).values())
    for (rule, layout, world), share in expected.items():
        # Under ZeRO-1 with the hidden matrices in a parameter group of their own: no matrix is cut.
        found = estimate_rule(shapes if layout == "zero" else rest | shapes, rule, world=world, layout=layout)
        gradients = 2 * numel * (world - 1) / world
        assert max(found.exchange_bytes) / gradients == pytest.approx(share, rel=0.05, abs=1e-6), (rule, layout)
