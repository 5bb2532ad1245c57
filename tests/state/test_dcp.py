"""The optimizer's state through ``torch.distributed.checkpoint``, at any number of ranks and in every form it has."""

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from ..ranks import run_ranks
from .dcp_runs import errors, load, make, save, train, whole

TOLERANCE = 1e-9
NESTED = StateDictOptions()
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OFFLOADED = StateDictOptions(cpu_offload=True)
FULL = StateDictOptions(full_state_dict=True)
# Whole on the CPU of the first rank; read there, and broadcast.
FULL_OFFLOADED = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT_FULL = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)


def assert_small(errors: dict[str, float]) -> None:
    assert len(errors) > 200
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE, f"{worst} is off by {errors[worst]:.1e}"


def links(rank: int, world: int, folder: str, engine: str, first: int) -> dict[str, float]:
    """Continue from the last link, unless this is the first, and save for the next, in two forms."""
    found: dict[str, float] = {}
    for name, options in (("nested", NESTED), ("flat", FLAT)):
        if first:
            model, wrapped, optimizer, loaded = load(
                engine, world, f"{folder}/{name}{first}", range(first, first + 3), options
            )
            found |= {f"{engine} {name} {key}": error for key, error in loaded.items()}
        else:
            model, wrapped, optimizer = make(engine, world)
            train(model, wrapped, optimizer, range(3))
        save(wrapped, optimizer, f"{folder}/{name}{first + 3}", options)
    return found


@pytest.mark.parametrize(
    "chain",
    [
        [("fsdp2", 2), ("plain", 1)],
        pytest.param([("fsdp2", 4), ("fsdp2", 2), ("fsdp2", 3), ("plain", 1), ("ddp", 2)], marks=pytest.mark.slow),
        pytest.param([("hsdp", 4), ("fsdp2 dim 1", 2), ("tp alternating", 4), ("fsdp2", 1)], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_continues_exactly(chain, tmp_path):
    for number, (engine, world) in enumerate(chain):
        for found in run_ranks(links, world, str(tmp_path), engine, 3 * number):
            if number:
                assert_small(found)


def forms(rank: int, world: int, folder: str) -> dict[str, dict[str, float]]:
    """Save in one form and load in it, or in the one that goes with it."""
    pairs = {
        "offloaded": (OFFLOADED, OFFLOADED),
        "full": (FULL, FULL),
        "broadcast": (FULL_OFFLOADED, BROADCAST),
        # torch itself cannot load a flat one with full_state_dict=True, for AdamW neither; whole tensors fit without.
        "flat full": (FLAT_FULL, FLAT),
    }
    results = {}
    for name, (saving, loading) in pairs.items():
        how = "dcp" if name == "offloaded" else "torch"
        model, wrapped, optimizer = make("fsdp2", world)
        train(model, wrapped, optimizer, range(3))
        save(wrapped, optimizer, f"{folder}/{name}", saving, how)
        for engine in ("fsdp2", "ddp"):
            results[f"{name} {engine}"] = load(engine, world, f"{folder}/{name}", range(3, 6), loading, how)[-1]
    return results


@pytest.mark.slow
def test_every_form_continues_exactly(tmp_path):
    for results in run_ranks(forms, 2, str(tmp_path)):
        for found in results.values():
            assert_small(found)


def asking(rank: int, world: int) -> dict[str, object]:
    """What asking for a state dict does to an optimizer: nothing."""
    model, wrapped, optimizer = make("fsdp2", world)
    fresh = get_optimizer_state_dict(wrapped, optimizer)
    found: dict[str, object] = {"steps": {float(s["step"]) for s in fresh["state"].values()}}
    found["zero"] = not any(bool(s["exp_avg"].to_local().any()) for s in fresh["state"].values())
    for step in range(4):
        train(model, wrapped, optimizer, range(step, step + 1))
        state = get_optimizer_state_dict(wrapped, optimizer)
    found["errors"] = errors(model, optimizer, 4)
    # The first dimension as the owners have it; numbers alike on all ranks.
    moments = {name: s["exp_avg"] for name, s in state["state"].items()}
    found["kinds"] = all(isinstance(m, DTensor) for m in moments.values())
    found["shapes"] = {name: tuple(m.shape) for name, m in moments.items()}
    found["local"] = {name: tuple(m.to_local().shape) for name, m in moments.items()}
    found["numbers"] = {
        name: whole(torch.as_tensor(s.get("last_norm", 0.0))).tolist() for name, s in state["state"].items()
    }
    return found


def test_asking_for_the_state_changes_nothing():
    first, second = run_ranks(asking, 2)
    for found in (first, second):
        assert found["steps"] == {0}
        assert found["zero"]
        assert found["kinds"]
        assert_small({f"{i} {name}": error for i in range(2) for name, error in found["errors"].items()})
    assert first["numbers"] == second["numbers"]
    # (9, 25) is wide: 25 channels; three experts of (8, 5) have 24; a norm is as it was.
    assert first["shapes"]["layers.1.linear.weight"] == (25, 3)
    owned = first["local"]["layers.1.linear.weight"], second["local"]["layers.1.linear.weight"]
    assert owned[0][0] + owned[1][0] == 25
    # Rows of a tall matrix are its channels, so torch's own even chunks.
    assert (first["local"]["layers.0.linear.weight"], second["local"]["layers.0.linear.weight"]) == ((12, 3), (12, 3))
    assert first["shapes"]["layers.11.weight"] == (24, 3)
    assert first["shapes"]["layers.1.norm"] == (25,)
