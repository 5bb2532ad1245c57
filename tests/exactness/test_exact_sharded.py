"""FSDP1, FSDP2 on other dims, tensor parallelism, offload: equal to one process with whole matrices, float64 to 1e-9.

FSDP1's own CPU offload runs on accelerators only (it pins memory and waits for a stream): ``test_gpu.py``.
The tolerance is that of ``test_exact_torch.py``: rounding in another order of summation, amplified over the steps.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from apollo_dist import APOLLO

from ..judge import judge
from ..models import SHAPES, Bag, gradients, groups_of, low_rank, mean_gradients, relative_error, shapes_of
from ..ranks import run_ranks
from ..reference import Reference
from ..sharded import FSDP1, fsdp1, fsdp2, tp, whole
from ..versions import LOCAL, uneven_strides, version
from .test_exact_torch import engine_of

STEPS, GAP, TOLERANCE = 16, 5, 1e-9
CASES = {
    "channel": {"scale_type": "channel", "weight_decay": 0.1},
    "tensor": {"scale_type": "tensor", "scale": 4.0, "rank": 1},
}
# Columns that 2 and 4 ranks divide evenly, as FSDP2 wants on dim 1.
EVEN = [*SHAPES.values(), (16, 4), (6, 24), (8, 8)]
WRAPS = {"fsdp1": fsdp1, "fsdp2": fsdp2, "tp": tp}


def train(engine: str, kind: str, world: int, rank: int, options: dict) -> dict[str, float]:
    """Errors against the reference after several numbers of steps, the largest over all parameters."""
    model = Bag(shapes=EVEN).double()
    shapes = shapes_of(model)
    options = dict(options)
    ranks = low_rank(model, options.pop("rank", 3))
    reference = Reference(dict(model.named_parameters()), ranks, update_proj_gap=GAP, seed=5, **options)
    wrapped = WRAPS[engine](model, kind, world)
    optimizer = APOLLO(groups_of(wrapped, ranks), model=wrapped, update_proj_gap=GAP, seed=5, **options)
    # Ranks of one tensor-parallel pair work on the same data.
    data, copies = (rank // 2, world // 2) if engine == "tp" else (rank, world)
    errors = {}
    for step in range(STEPS):
        wrapped(gradients(shapes, step, data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(mean_gradients(shapes, step, copies))
        if step in (0, 1, STEPS - 1):
            for name, p in whole(wrapped).items():
                errors[f"{name} at step {step + 1}"] = relative_error(p, reference.weights[name])
    assert len(errors) == 3 * len(shapes)
    return errors


def all_cases(rank: int, world: int, kinds: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    return {
        f"{engine} {kind}, {name}": train(engine, kind, world, rank, options)
        for engine, kind in kinds
        for name, options in CASES.items()
    }


TWO = [("fsdp1", kind) for kind in FSDP1]
TWO += [("fsdp2", "dim 1"), ("fsdp2", "offload"), ("fsdp2", "kept"), ("tp", "rows"), ("tp", "columns")]
QUICK = [("fsdp1", "full"), ("fsdp1", "one flat"), ("fsdp2", "dim 1"), ("tp", "rows")]
FOUR = [("fsdp1", kind) for kind in ("full", "grad op", "none", "hybrid", "one flat")]
FOUR += [("fsdp2", "dim 1"), ("tp", "alternating"), ("tp", "columns")]


@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        (1, [("fsdp1", "full")]),
        pytest.param(2, QUICK, marks=pytest.mark.slow),
        pytest.param(2, [kind for kind in TWO if kind not in QUICK], marks=pytest.mark.slow),
        pytest.param(3, [("fsdp1", "full"), ("fsdp1", "one flat")], marks=pytest.mark.slow),
        pytest.param(4, FOUR[:4], marks=pytest.mark.slow),
        pytest.param(4, FOUR[4:], marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference(world, kinds):
    judge(run_ranks(all_cases, world, kinds), TOLERANCE, engine=engine_of)


PLACEMENTS = [
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(0, split_factor=3), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    (Shard(0), Shard(0)),
    (_StridedShard(1, split_factor=2), Replicate()),
]


def understood(placements: tuple) -> bool:
    """torch 2.11 makes tensors that one axis divides with strides, and cannot put them together."""
    alone = isinstance(placements[0], _StridedShard) and isinstance(placements[1], Replicate)
    return not alone or not (2, 9) <= version("torch") < (2, 13)


def placed(rank: int, world: int) -> list[str]:
    """Compare what the layout says this rank holds with the values that DTensor gave it."""
    mesh = init_device_mesh("cpu", (2, 2))
    from torch.distributed.tensor.debug import CommDebugMode

    from apollo_dist.sharding import dtensor
    from apollo_dist.sharding.local_shard import view_of

    wrong = []
    for shape in ((13, 6), (5, 9), (2, 3), (3, 5, 7)):
        values = torch.arange(torch.Size(shape).numel()).double().view(shape)
        for placements in PLACEMENTS:
            if version("torch") < (2, 7) and not uneven_strides(shape, placements, mesh):
                continue  # torch's own error
            local = distribute_tensor(values, mesh, list(placements), **LOCAL)
            dtensor.make_groups([local], None)
            parameter = nn.Parameter(local)
            if not uneven_strides(shape, placements, mesh):
                with pytest.raises(ValueError, match="pieces over several mesh axes"):
                    dtensor.read("layers.0.weight", parameter)
                continue
            shard = dtensor.read("layers.0.weight", parameter)
            flat = shard.weight().reshape(-1)
            # A gradient that autograd left whole on the second axis, or on both, is cut without communication.
            for left in ((placements[0], Replicate()), (Replicate(), Replicate())):
                parameter.grad = distribute_tensor(values, mesh, list(left), **LOCAL)
                with CommDebugMode() as communicated:
                    same = torch.equal(shard.grad(), local.to_local())
                if not same or communicated.get_total_counts():
                    wrong.append(f"{shape} {placements}: the gradient {left}, {communicated.get_total_counts()}")
            for box in shard.partition.boxes(shard.group.rank, shape):
                inside = values[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
                if not torch.equal(inside, view_of(flat, box.offset, box.sizes, box.strides)):
                    wrong.append(f"{shape} {placements} box {box}")
            m, n = shape[-2:]
            count = shape[0] if len(shape) == 3 else 1
            for index in range(count):
                tiles = shard.partition.tiles(index, m, n)
                matrix = values[index] if count > 1 else values
                for tile in tiles[shard.group.rank]:
                    inside = matrix[tile.row : tile.row + tile.height, tile.column : tile.column + tile.width]
                    strides = (tile.stride, 1) if tile.stride else None
                    if not torch.equal(inside, view_of(flat, tile.offset, (tile.height, tile.width), strides)):
                        wrong.append(f"{shape} {placements} tile {tile}")
                # However many rows there are.
                if max(map(len, tiles)) > 4:
                    wrong.append(f"{shape} {placements}: {max(map(len, tiles))} tiles of matrix {index}")
                # All ranks together hold each element once.
                seen = torch.zeros(m, n)
                for held in tiles:
                    for t in held:
                        seen[t.row : t.row + t.height, t.column : t.column + t.width] += 1
                if not bool((seen == 1).all()):
                    wrong.append(f"{shape} {placements}: matrix {index} is not covered once")
            # Reading a layout leaves the mesh as it was: torch still puts the tensor together.
            if understood(placements) and not torch.equal(local.full_tensor(), values):
                wrong.append(f"{shape} {placements}: not whole any more")
    return wrong


@pytest.mark.slow
def test_tiles_are_where_dtensor_put_them():
    assert run_ranks(placed, 4) == [[]] * 4


class MLP(nn.Module):
    """Two linear layers as tensor parallelism divides them: rows, then columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10), nn.LayerNorm(10)) for _ in range(2)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def parallelized(rank: int, world: int) -> float:
    """torch's own ``parallelize_module`` inside ``fully_shard`` on real data, beside one process; the largest error."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    alone, model = MLP().double(), MLP().double()
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    options = {"rank": 3, "update_proj_gap": 3, "lr": 1e-2, "weight_decay": 0.1}
    optimizer = APOLLO(model, **options)
    # One process has no other ranks to agree with.
    groups = [dist.new_group([k]) for k in range(world)]
    single = APOLLO(alone, **options, process_group=groups[rank])
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        batch = torch.randn(2, 5, 10, generator=generator, dtype=torch.float64)
        model(batch[rank // 2]).backward()
        (alone(batch[0]) / 2 + alone(batch[1]) / 2).backward()
        for opt in (optimizer, single):
            opt.step()
            opt.zero_grad()
    expected = dict(alone.named_parameters())
    return max(relative_error(p, expected[name].detach()) for name, p in whole(model).items())


@pytest.mark.slow
def test_a_parallelized_model_equals_one_process():
    assert max(run_ranks(parallelized, 4)) < TOLERANCE


def test_flat_ranges_follow_each_other():
    """The ranges of all ranks, as read on each of them, are those of one division of the parameter."""
    for partitions in zip(*run_ranks(ranges, 3), strict=True):
        assert partitions[0] == partitions[1] == partitions[2]
        name, numel, found = partitions[0]
        held = [r for r in found if r[0] < r[1]]
        assert held[0][0] == 0 and held[-1][1] == numel, name
        assert all(a[1] == b[0] for a, b in pairwise(held)), name


def ranges(rank: int, world: int) -> list[tuple]:
    from apollo_dist.sharding import fsdp1 as layout
    from apollo_dist.sharding.parameters import logical_shape

    wrapped = fsdp1(Bag(), "one flat", world)
    layout.register(wrapped)
    named = [(name, p) for name, p in wrapped.named_parameters()]
    return [(name, torch.Size(logical_shape(p)).numel(), layout.read(name, p).partition.ranges) for name, p in named]
