"""What a checkpoint of a model and its optimizer consists of, by name, whatever the layout.

Keys of the tensors::

    model.NAME                    a weight in the dtype that the optimizer updates (the fp32 master, where there is
                                  one), a frozen parameter, or a buffer; logical shape. In INT8 it has
                                  ``model.NAME.codes`` and ``model.NAME.scale`` in its place
    optimizer.MATRIX.STATE        of a matrix that a rule updates: by channel (channels, width), by element (m, n),
                                  or one number (1,), as the rule declares; MATRIX is NAME, or NAME[e] of a stack of
                                  experts
    optimizer.MATRIX.projection   P^T, (min(m, n), r), where it does not follow from the seed
    optimizer.NAME.STATE          of another parameter, in the parameter's shape
    optimizer.MATRIX.step         steps taken, (1,) int64
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from ..distributed import check_same_on_all_ranks, rank_of, run_together
from ..sharding import detect, fsdp1
from ..sharding.deepspeed import zero, zero_engine
from ..sharding.local_shard import LocalShard, view_of
from ..sharding.names import canonical_name
from ..state.identity import PROJECTIONS
from ..state.slots import PROJECTION
from . import elementwise, int8
from .opened import BUFFER, FROZEN, LOW_RANK, Contents
from .options import options_of
from .shards import Piece, Shards

if TYPE_CHECKING:
    from ..rules.base import Rules
    from ..step.elementwise import ElementwiseTensor
    from ..step.matrix import Matrix
    from ..step.plan import StepPlan

logger = logging.getLogger("apollo_dist")


@runtime_checkable
class NamedState(Protocol):
    """An optimizer of this library: it plans its step by the names of parameters, and its rules declare the state."""

    rules: Rules
    seed: int
    param_groups: list[dict[str, Any]]

    def expect_state(self, names: Set[str]) -> None:
        """Make state for these parameters when next prepared, also while they are frozen."""

    def take_accepted(self) -> frozenset[str]:
        """What the load that begins may bring otherwise."""

    def prepare(self, engine: Any = None) -> list[StepPlan]:
        """Make the state now; one plan for each call of ``step()``. A collective."""


def contents(model: Any, optimizer: Any, saved: Mapping[str, Any] | None = None) -> Contents:
    """Open a model and its optimizer; a collective, and state that does not exist yet is made.

    Args:
        model: a model as it was wrapped (plain, DDP, FSDP2), or a DeepSpeed engine.
        optimizer: APOLLO or an element-wise optimizer of torch, or DeepSpeed's wrapper around one; for an engine None
            means the engine's.
        saved: a checkpoint's description, if one is to be loaded: parameters that are frozen here get state where it
            has some of theirs, and without an optimizer it is the weights that are wanted.

    Raises:
        ValueError: if it cannot be told by names which parameter is which, or the layout is not supported.
    """
    found = Contents(engine=model if zero_engine.is_engine(model) else None)
    client = run_together(lambda: _client(found.engine, optimizer, saved is not None))
    found.weights_alone = client is None
    check_same_on_all_ranks(
        {"optimizer to save or load": type(client).__name__, "under DeepSpeed": found.engine is not None}
    )
    if _is_ours(client) and saved is not None:
        found.accepted = client.take_accepted()
        client.expect_state(
            {name for name, about in saved["parameters"].items() if about["kind"] not in (FROZEN, BUFFER)}
        )
    builds = client.prepare(found.engine) if _is_ours(client) else []
    module = model if found.engine is None else model.module
    run_together(lambda: _show_sharded(module))
    # Also of parameters that the optimizer does not train.
    detect.make_groups(module.parameters(), None)
    run_together(lambda: _fill(found, module, client, builds))
    return found


def _show_sharded(module: nn.Module) -> None:
    fsdp1.register(module)
    detect.reshard(module)


def _fill(found: Contents, module: nn.Module, client: torch.optim.Optimizer | None, builds: Sequence[StepPlan]) -> None:
    """The local part of ``contents``, which may fail on one rank only."""
    if client is None:
        found.description["parameters"] = {}
        zero_engine.check_free(module)
        _model(found, module, [], set())
        return
    if found.engine is not None:
        found.wrapper = zero.from_engine(found.engine, client).wrapper
    held = _ours(found, client, builds) if _is_ours(client) else elementwise.add(found, client, module)
    idle = {id(p) for build in builds for _, p, _ in build.idle}
    _model(found, module, held, {id(p) for group in client.param_groups for p in group["params"]} - idle)
    found.description["engine"] = zero_engine.progress(found.engine, found.wrapper)


def _client(engine: Any, optimizer: Any, may_be_none: bool) -> torch.optim.Optimizer | None:
    """The optimizer that makes the update; None if there is none, where there may be none."""
    if optimizer is None and engine is not None:
        optimizer = zero_engine.client_optimizer(engine)
    if optimizer is None and may_be_none:
        return None
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's wrappers, Accelerate's
    inner = getattr(inner, "optimizer", inner)
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(f"pass the optimizer that trains the model, got {type(optimizer).__name__}")
    return inner


def _is_ours(client: object) -> TypeGuard[NamedState]:
    return isinstance(client, NamedState)


def _ours(found: Contents, optimizer: NamedState, builds: Sequence[StepPlan]) -> list[LocalShard]:
    """Add state and description of an optimizer of ours; the shards of its parameters."""
    parameters = found.description.setdefault("parameters", {})
    shards = [shard for build in builds for shard, _ in build.shards]
    for build in builds:
        parameters.update((name, {"kind": rule}) for name, rule in build.element_rules.items())
        for matrix in (m for group_step in build.shard_groups for m in group_step.matrices):
            rank = matrix.spec.rank
            entries = matrix.declared.reduce.projection
            about = {"kind": LOW_RANK, "rank": rank, "entries": entries} if rank else {"kind": matrix.rule.name}
            parameters[matrix.shard.name] = about
            _add_matrix(found, matrix)
        for tensor in build.elementwise:
            _add_adam(found, tensor)
    # With those that have no state yet, whose options change meanwhile.
    found.groups = [
        (
            group,
            [h.name for build in builds for h, of in build.shards if of is group]
            + [name for build in builds for name, _, of in build.idle if of is group],
        )
        for group in optimizer.param_groups
    ]
    found.description["optimizer"] = {
        "name": optimizer.rules.name,
        "seed": optimizer.seed,
        "projections": PROJECTIONS,
        "groups": [{"options": options_of(group), "parameters": names} for group, names in found.groups],
    }
    return shards


def _add_matrix(found: Contents, m: Matrix) -> None:
    key = f"optimizer.{m.spec.name}"
    for name, width in m.declared.state.channel.items():
        pieces, row = [], 0
        for start, stop in m.channels.owned.ranges:
            pieces.append(Piece((start, 0), m.state[name][row : row + stop - start]))
            row += stop - start
        found.tensors[f"{key}.{name}"] = Shards((m.spec.channels, width), pieces)
    for name in m.declared.state.element:
        pieces = [
            Piece((tile.row, tile.column), view_of(m.state[name], at, (tile.height, tile.width), tile.strides))
            for tile, at in m.pieces
        ]
        found.tensors[f"{key}.{name}"] = Shards((m.place.m, m.place.n), pieces)
    # A rank without a tile takes no part in the matrix's sums: its numbers are not the matrix's.
    writes = bool(m.tiles)
    for name in m.declared.state.matrix:
        found.tensors[f"{key}.{name}"] = Shards.whole(m.state[name].view(1), writes)
    projection = m.declared.projection_shape(m.place.m, m.place.n)
    if projection is not None:
        pieces = [Piece((0, 0), m.state[PROJECTION])] if writes else []
        found.tensors[f"{key}.{PROJECTION}"] = Shards(projection, pieces, writes)
    _add_step(found, key, m.state, writes)


def _add_adam(found: Contents, tensor: ElementwiseTensor) -> None:
    shard, key = tensor.shard, f"optimizer.{tensor.shard.name}"
    boxes = shard.partition.boxes(shard.group.rank, shard.shape)
    if not torch.Size(shard.shape).numel():
        return
    for name in tensor.names:
        found.tensors[f"{key}.{name}"] = Shards.of(shard.shape, boxes, tensor.state[name], key)
    _add_step(found, key, tensor.state, True)


def _add_step(found: Contents, key: str, state: dict[str, Any], writes: bool) -> None:
    step = torch.tensor([state["step"]], dtype=torch.int64)
    found.tensors[f"{key}.step"] = Shards.whole(step, writes)
    found.after_load.append(lambda: state.update(step=int(step)))


def _model(found: Contents, module: nn.Module, shards: Sequence[LocalShard], optimized: set[int]) -> None:
    """Add the weights: those that the optimizer updates from its shards, the others from the model."""
    names = {canonical_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
    for shard in shards:
        if shard.name not in names:
            raise ValueError(
                f"the optimizer knows a parameter as {shard.name}, which is no name of the model's: a checkpoint is "
                "keyed by names. Build the optimizer from the model, or from named_parameters()"
            )
        _add_shard(found, shard, found.description["parameters"][shard.name])
    held = {shard.name for shard in shards}
    for name, parameter in module.named_parameters():
        name = canonical_name(name)
        if name not in held and id(parameter) not in optimized:
            _add_shard(found, _frozen(name, parameter), {"kind": FROZEN})
    first = rank_of() == 0
    for name, buffer in persistent_buffers(module):
        found.description["parameters"][name] = {**_described(buffer.shape, buffer.dtype), "kind": BUFFER}
        if buffer.numel():
            found.tensors[f"model.{name}"] = Shards.whole(buffer, writes=first)


def _add_shard(found: Contents, shard: LocalShard, about: Mapping[str, Any]) -> None:
    found.description["parameters"][shard.name] = {**_described(shard.shape, shard.dtype), **about}
    if shard.rows is not None:
        found.description["parameters"][shard.name][int8.STORED] = int8.INT8
        int8.add(found, shard.shape, shard.rows)
    elif torch.Size(shard.shape).numel():
        boxes, local = shard.partition.boxes(shard.group.rank, shard.shape), shard.weight()
        if local.numel() != shard.numel:
            raise ValueError(
                f"{shard.name}: its weights are not in memory between steps (NVMe offload), and cannot be saved or "
                "loaded by name. Offload to the CPU, or use engine.save_checkpoint and load_checkpoint"
            )
        found.tensors[f"model.{shard.name}"] = Shards.of(shard.shape, boxes, local, shard.name)


def _frozen(name: str, parameter: Tensor) -> LocalShard:
    shard = zero_engine.read_frozen(name, parameter)
    return detect.read([parameter], lambda _: name, zero.Engine())[0] if shard is None else shard


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of ``module`` that belong to its state dict, by canonical name."""
    for prefix, inner in module.named_modules():
        for leaf, buffer in inner.named_buffers(recurse=False):
            if leaf not in inner._non_persistent_buffers_set:
                yield canonical_name(f"{prefix}.{leaf}" if prefix else leaf), buffer


def _described(shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
