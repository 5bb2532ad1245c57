"""INT8 weights that cannot be trained exactly are refused, with the reason, on every rank."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from apollo_dist import APOLLO, AdamMini

from ..engines import initialize, zero_config
from ..int8 import Lines, quantized
from ..models import gradients, shapes_of
from ..ranks import run_ranks

pytest.importorskip("torchao", reason="torchao is an extra: pip install 'apollo-dist[quantized]'")


def ours(model):
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    others = [(name, p) for name, p in model.named_parameters() if p.dim() != 2]
    return APOLLO([{"params": matrices, "rank": 2}, {"params": others}])


def sharded(rank, shapes, mesh, placements=None):
    model = quantized(Lines(shapes=shapes))
    if placements is None:
        return ours(fully_shard(model, mesh=mesh))
    weight = model.layers[0].linear.weight
    model.layers[0].linear.weight = torch.nn.Parameter(DTensor.from_local(weight.detach(), mesh, placements))
    return ours(model)


def drifted(rank):
    """Replicas whose weights differ from the start."""
    model = quantized(Lines(seed=rank))
    wrapped = DistributedDataParallel(model, init_sync=False)
    optimizer = ours(wrapped)
    wrapped(gradients(shapes_of(model), 0, 0)).backward()
    optimizer.step()


def under_deepspeed(stage, **config):
    model = quantized(Lines())
    arguments = {"model_parameters": model.parameters()} if "optimizer" in config else {"optimizer": ours(model)}
    initialize(model, zero_config(stage, **config), **arguments)


def heads_cut(mesh):
    """Adam-mini has statistics of heads of 4 rows, and each of 2 ranks has 6 of the 12 rows."""
    model = fully_shard(quantized(Lines(shapes=[(12, 7)])), mesh=mesh)
    AdamMini([("model.layers.0.self_attn.q_proj.weight", model.layers[0].linear.weight)], num_heads=3).prepare()


def all_of(rank, world):
    """The errors of all cases, on one rank."""
    mesh = init_device_mesh("cpu", (world,))
    by_name = {"optimizer": {"type": "APOLLO", "params": {"lr": 0.01, "rank": 2}}}
    cases = {
        "uneven": lambda: sharded(rank, [(7, 8)], mesh),
        "dim 1": lambda: sharded(rank, [(8, 8)], mesh, [Shard(1)]),
        "replicas": lambda: drifted(rank),
        "heads": lambda: heads_cut(mesh),
        "ZeRO-2": lambda: under_deepspeed(2),
        "ZeRO-3 by name": lambda: under_deepspeed(3, **by_name),
    }
    found = {}
    for name, make in cases.items():
        try:
            make()
        except ValueError as error:
            found[name] = str(error)
    return found


def test_refused_on_all_ranks():
    words = {
        "uneven": "has 7 rows on 2 ranks",
        "dim 1": "fully_shard on dim 0",
        "replicas": "INT8 weights of layers.0.linear.weight",
        "heads": "has statistics of several rows",
        "ZeRO-2": "DeepSpeed keeps fp32 masters",
        "ZeRO-3 by name": "DeepSpeed keeps fp32 masters",
    }
    for found in run_ranks(all_of, 2):
        assert found.keys() == words.keys()
        for name, word in words.items():
            assert word in found[name], (name, found[name])


def on_one_rank(rank, world):
    try:
        ours(fully_shard(quantized(Lines())))
    except ValueError as error:
        return str(error)


def test_fsdp2_on_one_rank():
    assert "FSDP2 on one rank" in run_ranks(on_one_rank, 1)[0]


def test_another_tensor_of_torchao():
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    model = Lines()
    quantize_(model, int8_mixed_precision_training())
    with pytest.raises(ValueError, match="stored as torchao's Int8MixedPrecisionTrainingLinearWeight"):
        ours(model)
