"""The table of rules on the ranks of a test: each rule under each layout, and its state from one to another."""

from __future__ import annotations

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import checkpoint, layerwise
from apollo_dist.planning.estimate import estimate_rule
from apollo_dist.selection.roles import of_model

from ..engines import full_weights, initialize, prepare, zero_config
from ..models import gradients, mean_gradients, relative_error, shapes_of
from ..sharded import fsdp1, fsdp2, whole
from .problems import CASES, COMMON, Case, Llama

STEPS = 6
FEW = ("fsdp1 one flat", "fsdp2", "fsdp2 dim 1", "in backward")
Errors = dict[str, dict[str, float]]  # by case and weight


def tensor_parallel(model: nn.Module, world: int) -> nn.Module:
    """As LLaMA is divided: queries, keys, values and the head by rows, what follows them by columns."""
    mesh = init_device_mesh("cpu", (world,))
    for name, module in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        dim = {"o_proj": 1, "down_proj": 1}.get(leaf, 0)
        if not leaf.endswith("_proj") and leaf not in ("lm_head", "embed_tokens"):
            continue
        for key, p in list(module.named_parameters(recurse=False)):
            placement = Shard(dim) if p.dim() > 1 or dim == 0 else Replicate()
            divided = distribute_tensor(p.detach(), mesh, [placement])
            setattr(module, key, nn.Parameter(divided, p.requires_grad))
    return model


def hsdp(model: nn.Module, world: int) -> nn.Module:
    """Two replicas of shards."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {
    "plain": lambda model, world: model,
    "ddp": lambda model, world: DistributedDataParallel(model),
    "fsdp1 full": lambda model, world: fsdp1(model, "full", world),
    "fsdp1 one flat": lambda model, world: fsdp1(model, "one flat", world),
    "fsdp2": lambda model, world: fsdp2(model, "", world),
    "fsdp2 dim 1": lambda model, world: fsdp2(model, "dim 1", world),
    "fsdp2 offload": lambda model, world: fsdp2(model, "offload", world),
    "hsdp": hsdp,
    "tp": tensor_parallel,
}


class Run:
    """A rule in training: the model as a layout has it, and what should become of it."""

    def __init__(self, rule: str, layout: str, world: int, dense=None, seed: int = 0, tied: bool = False) -> None:
        self.rule, self.world, self.layout = rule, world, layout
        model = Llama(seed, tied).double()
        self.shapes = shapes_of(model)
        self.dense = dense or CASES[rule].dense(dict(model.named_parameters()))
        in_backward = layout == "in backward"
        self.wrapped = WRAPS["fsdp2" if in_backward else layout](model, world)
        self.optimizer = CASES[rule].optimizer(self.wrapped, layerwise.attach if in_backward else None)

    def train(self, steps: range, rank: int) -> None:
        """Steps with the gradients' mean over the ranks; tensor parallelism has one gradient for all."""
        together = self.layout in ("plain", "tp")
        for step in steps:
            self.wrapped(gradients(self.shapes, step, 0 if together else rank)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.dense.step(mean_gradients(self.shapes, step, 1 if together else self.world))

    def check_bytes(self, rank: int) -> None:
        """The state has the size that was predicted; in float64 twice that of float32, but for what is in bfloat16."""
        model = Llama()
        made = CASES[self.rule]
        options = {key: value for key, value in made.options.items() if key != "betas"}
        if "rank" in options:
            options["low_rank"] = [n for n, p in model.named_parameters() if made.form(n, p.shape)[0] == "low_rank"]
        found = estimate_rule(
            {name: tuple(p.shape) for name, p in model.named_parameters()},
            made.rule,
            world=self.world,
            layout={"plain": "whole"}.get(self.layout, self.layout),
            roles=of_model(model),
            **options,
        )
        bytes_ = self.optimizer.state_bytes()
        kept = [value for slot in self.optimizer.named_state().values() for value in slot.values()]
        halves = sum(v.nbytes for v in kept if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16)
        assert bytes_ == 2 * (found.state_bytes[rank] - halves) + halves, (self.rule, self.layout, bytes_)
        assert bool(halves) == ("projection_dtype" in made.options)

    def errors(self) -> dict[str, float]:
        """The relative error of each weight."""
        found = whole(self.wrapped)
        assert found.keys() == self.dense.weights.keys()
        return {name: relative_error(found[name], wanted) for name, wanted in self.dense.weights.items()}


def layouts(rank: int, world: int, names: list[str], folder: str) -> Errors:
    """Each rule under each layout, and through checkpoints from layout to layout: relative errors."""
    errors = {}
    for rule in CASES:
        for layout in (name for name in names if name in FEW or not CASES[rule].few):
            run = Run(rule, layout, world, tied=layout == "ddp")
            run.train(range(STEPS), rank)
            errors[f"{rule}, {layout}"] = run.errors()
            if layout in ("plain", "fsdp2"):
                run.check_bytes(rank)
        if not CASES[rule].few or "projection_dtype" in CASES[rule].options:
            errors |= moved(rule, rank, world, f"{folder}/{rule}")
    return errors


def moved(rule: str, rank: int, world: int, folder: str) -> Errors:
    """Training that goes on under other layouts, by our checkpoints, by DCP, and by state dicts."""
    errors = {}
    run = Run(rule, "fsdp2", world)
    run.train(range(3), rank)
    checkpoint.save(f"{folder}/1", run.wrapped, run.optimizer)
    run = Run(rule, "fsdp1 full", world, run.dense, seed=1)
    checkpoint.load(f"{folder}/1", run.wrapped, run.optimizer)
    run.train(range(3, 5), rank)
    errors[f"{rule}, checkpoint fsdp2 -> fsdp1"] = run.errors()
    checkpoint.save(f"{folder}/2", run.wrapped, run.optimizer)
    run = Run(rule, "fsdp2", world, run.dense, seed=2)
    checkpoint.load(f"{folder}/2", run.wrapped, run.optimizer)
    run.train(range(5, 7), rank)
    errors[f"{rule}, checkpoint fsdp1 -> fsdp2"] = run.errors()
    after = "fsdp2 dim 1" if world == 2 else "ddp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, state = get_state_dict(run.wrapped, run.optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=f"{folder}/dcp")
        run = Run(rule, after, world, run.dense, seed=3)
        weights, state = get_state_dict(run.wrapped, run.optimizer)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=f"{folder}/dcp")
        set_state_dict(run.wrapped, run.optimizer, model_state_dict=weights, optim_state_dict=state)
    run.train(range(7, 9), rank)
    errors[f"{rule}, DCP fsdp2 -> {after}"] = run.errors()
    return errors


def start(model: nn.Module, stage: int, how: str, case: Case):
    """A DeepSpeed engine: with the optimizer from the code, or by its name in the JSON; "offload" of its state, and
    "sub-groups" of one or two matrices."""
    if how == "by name":
        config = zero_config(stage, optimizer={"type": case.json, "params": {**COMMON, **case.options}})
        return initialize(model, config, model_parameters=model.parameters())
    zero: dict[str, object] = {"sub_group_size": 200} if "sub-groups" in how else {}
    changes: dict[str, object] = {}
    if "offload" in how:
        zero, changes = {**zero, "offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False}
    config = zero_config(stage, zero_optimization=zero, **changes)
    return initialize(model, config, optimizer=case.optimizer(model))


def zero(rank: int, world: int, stages: list[tuple[int, str]], folder: str) -> Errors:
    """Each rule under stages of ZeRO, in fp32, from checkpoint to checkpoint: relative errors."""
    prepare()
    errors = {}
    for rule, made in ((rule, made) for rule, made in CASES.items() if not made.rounds):
        dense, at, shapes = None, 0, shapes_of(Llama())
        for stage, how in stages[-2:] if made.few else stages:
            if how == "by name" and made.json is None:
                continue
            model = Llama(seed=at)
            dense = dense or made.dense(dict(model.named_parameters()), torch.float32)
            engine = start(model, stage, how, made)
            if at:
                checkpoint.load(f"{folder}/{rule}", engine)
            for step in range(at, at + 3):
                engine.backward(engine(gradients(shapes, step, rank, torch.float32)))
                engine.step()
                dense.step(mean_gradients(shapes, step, world, torch.float32))
            at += 3
            found = full_weights(engine, model)
            case = f"{rule}, ZeRO-{stage} {how}".rstrip()
            errors[case] = {name: relative_error(found[name], wanted) for name, wanted in dense.weights.items()}
            checkpoint.save(f"{folder}/{rule}", engine)
    return errors
