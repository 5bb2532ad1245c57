"""The optimizer's state through ``torch.distributed.checkpoint``, at any number of ranks and in every form it has."""

from torch.distributed.checkpoint.state_dict import StateDictOptions

from .dcp_runs import load, save
from .ranks import run_ranks

TOLERANCE = 1e-9
FLAT, NESTED = StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions()


def saving(rank, world, engine, folder, steps, options, how="dcp"):
    save(engine, world, folder, steps, options, how)


def loading(rank, world, engine, folder, steps, options, how="dcp"):
    return load(engine, world, folder, steps, options, how)


def assert_small(results) -> None:
    for errors in results:
        assert len(errors) > 100
        worst = max(errors, key=errors.get)
        assert errors[worst] < TOLERANCE, f"{worst} is off by {errors[worst]:.1e}"


def chain(rank, world, folder):
    """FSDP2 at two ranks, in both forms, and back."""
    for name, options in (("nested", NESTED), ("flat", FLAT)):
        save("fsdp2", world, f"{folder}/{name}", 5, options)
    return {
        f"{name} {engine} {when}": error
        for name, options in (("nested", NESTED), ("flat", FLAT))
        for engine in ("fsdp2", "ddp")
        for when, error in load(engine, world, f"{folder}/{name}", range(5, 10), options).items()
    }


def test_at_two_ranks_and_then_one(tmp_path):
    assert_small(run_ranks(chain, 2, str(tmp_path)))
    for name, options in (("nested", NESTED), ("flat", FLAT)):
        assert_small([load("plain", 1, f"{tmp_path}/{name}", range(5, 10), options)])
