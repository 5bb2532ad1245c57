"""Compare two checkouts bit for bit: train the same cases with the code of each, in one run on one machine.

    python tests/same_bits.py OLD_CHECKOUT                # a git worktree of an earlier commit, against this checkout
    python tests/same_bits.py OLD_CHECKOUT NEW_CHECKOUT

Run it after every commit that moves code and should change no arithmetic. Stored results would not do: kernels, and so
bits, depend on the processor. Both checkouts are run with the test helpers of *this* one, and through public names of
the package only, so the old one may have any layout of modules.

Each case makes 20 steps with several refreshes of the projections, on CPU with gloo. Afterwards every local weight and
every tensor of every rank's optimizer state must have equal bits in both runs. Exit status 1, with a line for each
difference, if one has not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parents[1]
STEPS, GAP = 20, 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
CHANNEL = {"rank": 3, "weight_decay": 0.1, "scale": 2.0}
TENSOR = {"rank": 1, "scale_type": "tensor", "scale": 4.0}
KINDS = {"channel": CHANNEL, "tensor": TENSOR}
# Of one process: what other options do, and matrices that take several chunks of a batch and vectorized kernels.
ONE_PROCESS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{kind} {dtype}": (dtype, options) for kind, options in KINDS.items() for dtype in DTYPES},
    "tensor of rank 3": ("fp32", {**TENSOR, "rank": 3}),
    "channel, no limiter": ("fp32", {**CHANNEL, "disable_nl": True}),
    "tensor, no limiter": ("fp32", {**TENSOR, "disable_nl": True}),
    "maximize": ("fp32", {**CHANNEL, "maximize": True}),
    "lr tensor": ("fp32", {**CHANNEL, "lr": torch.tensor(0.02)}),
    "projections drawn anew": ("fp32", {**CHANNEL, "cache_projection": False}),
    "large, channel": ("fp32", {**CHANNEL, "rank": 128}),
    "large, tensor, bf16": ("bf16", TENSOR),
}
# By number of ranks (engine, kind of wrapping, dtype).
RANKS: dict[int, list[tuple[str, str, str]]] = {
    2: [
        ("fsdp1", "full", "fp32"), ("fsdp1", "one flat", "fp64"), ("fsdp2", "dim 1", "fp32"), ("fsdp2", "", "bf16"),
        ("in backward", "", "fp32"), ("zero", "1", "bf16"), ("zero", "2", "fp32"), ("zero", "3", "fp32"),
        ("zero", "3", "bf16"),
    ],
    3: [
        ("fsdp2", "", "fp32"), ("fsdp2", "", "bf16"), ("fsdp2", "", "fp64"), ("fsdp1", "full", "bf16"),
        ("zero", "2", "bf16"), ("zero", "3", "fp32"),
    ],
}  # fmt: skip
# Columns that two ranks can divide evenly, as FSDP2 wants on dim 1.
EVEN = [(24, 7), (6, 25), (9, 9), (1, 11), (3, 10), (13, 5), (5, 31), (2, 1), (16, 4), (6, 24), (40, 64), (64, 96)]
LARGE = [(2500, 132), (132, 2500), (300, 200), (200, 300)]


def tensors_of(weights: Iterator[tuple[str, Tensor]], optimizer: Any) -> dict[str, Tensor]:
    """Local weights and state, copied, by a name that says which."""
    found = {f"weight {name}": p.detach().cpu().clone() for name, p in weights}
    for name, slot in optimizer.named_state().items():
        for key, value in slot.items():
            if isinstance(value, Tensor):
                found[f"{key} of {name}"] = value.detach().cpu().clone()
        found[f"step of {name}"] = torch.tensor(float(slot["step"]))
    return found


def local_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The elements that this rank holds of each parameter."""
    for name, p in model.named_parameters():
        yield name, p.to_local() if hasattr(p, "to_local") else p


def in_one_process(dtype: str, options: dict[str, Any], large: bool) -> dict[str, Tensor]:
    """Train without ranks; some gradients are missing in some steps."""
    from apollo_dist import APOLLO
    from tests.models import Bag, gradients, groups_of, low_rank, shapes_of

    options = dict(options)
    model = Bag(shapes=LARGE if large else EVEN).to(DTYPES[dtype])
    groups = groups_of(model, low_rank(model, options.pop("rank")))
    optimizer = APOLLO(groups, seed=5, update_proj_gap=GAP, **options)
    shapes = shapes_of(model)
    for step in range(STEPS):
        given = gradients(shapes, step, 0, DTYPES[dtype])
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = None if i % 5 == 3 and step in (4, 5, 12) else given[name]
        optimizer.step()
    return tensors_of(local_weights(model), optimizer)


def on_ranks(rank: int, world: int, cases: list[tuple[str, str, str]]) -> dict[str, dict[str, Tensor]]:
    """All cases of one number of ranks, each with channel and tensor scaling."""
    found = {}
    for engine, kind, dtype in cases:
        for name, options in KINDS.items():
            train: Callable[..., dict[str, Tensor]] = {"zero": under_zero, "in backward": in_backward}.get(
                engine, under_fsdp
            )
            found[f"{engine} {kind} {dtype}, {name}"] = train(engine, kind, DTYPES[dtype], options, rank, world)
    return found


def under_fsdp(
    engine: str, kind: str, dtype: torch.dtype, options: dict[str, Any], rank: int, world: int
) -> dict[str, Tensor]:
    """FSDP1 and FSDP2 (``kind`` as in ``tests/sharded.py``)."""
    from apollo_dist import APOLLO
    from tests.models import Bag, gradients, groups_of, low_rank, shapes_of
    from tests.sharded import fsdp1, fsdp2

    options = dict(options)
    model = Bag(shapes=EVEN).to(dtype)
    shapes, ranks = shapes_of(model), low_rank(model, options.pop("rank"))
    wrapped = {"fsdp1": fsdp1, "fsdp2": fsdp2}[engine](model, kind, world)
    optimizer = APOLLO(groups_of(wrapped, ranks), model=wrapped, seed=5, update_proj_gap=GAP, **options)
    for step in range(STEPS):
        wrapped(gradients(shapes, step, rank, dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(local_weights(wrapped), optimizer)


def in_backward(
    engine: str, kind: str, dtype: torch.dtype, options: dict[str, Any], rank: int, world: int
) -> dict[str, Tensor]:
    """FSDP2 with updates inside backward."""
    from apollo_dist import layerwise
    from tests.models import Bag, gradients, groups_of, low_rank, shapes_of
    from tests.sharded import fsdp2

    options = dict(options)
    model = Bag(shapes=EVEN).to(dtype)
    shapes, ranks = shapes_of(model), low_rank(model, options.pop("rank"))
    wrapped = fsdp2(model, kind, world)
    optimizer = layerwise.attach(wrapped, groups_of(wrapped, ranks), seed=5, update_proj_gap=GAP, **options)
    for step in range(STEPS):
        wrapped(gradients(shapes, step, rank, dtype)).backward()
        optimizer.step()
    return tensors_of(local_weights(wrapped), optimizer)


def under_zero(
    engine: str, kind: str, dtype: torch.dtype, options: dict[str, Any], rank: int, world: int
) -> dict[str, Tensor]:
    """DeepSpeed's ZeRO, with ``kind`` as its stage."""
    from tests.engines import full_weights, initialize, prepare, zero_config
    from tests.models import Bag, gradients, groups_of, low_rank, shapes_of

    prepare()
    from apollo_dist import APOLLO

    options = dict(options)
    model = Bag(shapes=EVEN).to(dtype)
    ranks = low_rank(model, options.pop("rank"))
    optimizer = APOLLO(groups_of(model, ranks), seed=5, update_proj_gap=GAP, **options)
    low = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    engine_ = initialize(model, zero_config(int(kind), **low), optimizer=optimizer)
    shapes = shapes_of(model)
    for step in range(STEPS):
        engine_.backward(engine_(gradients(shapes, step, rank, dtype)))
        engine_.step()
    return tensors_of(iter(full_weights(engine_, model).items()), optimizer)


def record(path: Path) -> None:
    """Train all cases with the package that is imported, and save what became of them."""
    from tests.ranks import run_ranks
    from tests.same_bits import on_ranks  # not this module, whose name is __main__: ranks import it

    torch.set_num_threads(1)
    found: dict[str, dict[str, Tensor]] = {}
    for name, (dtype, options) in ONE_PROCESS.items():
        found[f"one process, {name}"] = in_one_process(dtype, options, name.startswith("large"))
    for world, cases in RANKS.items():
        for rank, results in enumerate(run_ranks(on_ranks, world, cases, timeout=900)):
            found.update({f"{world} ranks, {name}, rank {rank}": tensors for name, tensors in results.items()})
    torch.save(found, path)


def train_with(checkout: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The results of a checkout's package, under the helpers of this one."""
    folder.mkdir()
    (folder / "apollo_dist").symlink_to(checkout / "apollo_dist")
    (folder / "tests").symlink_to(HERE / "tests")
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.same_bits", "--record", str(folder / "result.pt")]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{checkout} failed:\n{process.stdout[-4000:]}{process.stderr[-4000:]}")
    results: dict[str, dict[str, Tensor]] = torch.load(folder / "result.pt")
    return results


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bits, NaN and signs of zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def differences(old: dict[str, dict[str, Tensor]], new: dict[str, dict[str, Tensor]]) -> Iterator[str]:
    """One line for each tensor that is not the same."""
    for case in old.keys() ^ new.keys():
        yield f"{case}: trained by one of the two only"
    for case in old.keys() & new.keys():
        for name in sorted(old[case].keys() | new[case].keys()):
            a, b = old[case].get(name), new[case].get(name)
            if a is None or b is None:
                yield f"{case}: {name} exists in the {'new' if a is None else 'old'} run only"
            elif not same(a, b):
                off = f"by {float((a.double() - b.double()).abs().max()):.1e}" if a.shape == b.shape else "in shape"
                yield f"{case}: {name} differs {off}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="checkout to compare with")
    parser.add_argument("new", type=Path, nargs="?", default=HERE, help="checkout to compare (default: this one)")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        record(args.record)
        return 0
    if args.old is None:
        parser.error("which checkout to compare with?")
    with tempfile.TemporaryDirectory() as folder:
        old, new = (
            train_with(path.resolve(), Path(folder) / name) for name, path in (("old", args.old), ("new", args.new))
        )
    found = list(differences(old, new))
    print("\n".join(found[:50]))
    compared = sum(map(len, old.values()))
    print(f"{compared} tensors of {len(old)} results, {len(found)} of them differ")
    assert compared, "nothing was compared"
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
