"""On an accelerator a step never waits for the device, under any layout.

The step runs on the meta device, whose tensors have no values: what needs a value fails there as well. A dispatch mode
names the operation, and sees what meta tensors allow: copies to the host.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_dist import APOLLO
from apollo_dist.kernels import costs
from apollo_dist.planning.fake import meta_model
from apollo_dist.pretrain.config import ModelConfig

from ..int8 import quantized

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
aten = torch.ops.aten
# Operations whose result the host must know before it goes on: a value, or how many elements there are.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}


KERNELS = [pytest.param("torch", marks=pytest.mark.slow), "triton"]


def devices(tree):
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def asynchronous(args, position, kwargs):
    """Whether a copy was asked not to wait; from the host it then has to come from pinned memory."""
    return args[position] if len(args) > position else (kwargs or {}).get("non_blocking", False)


class NoWait(TorchDispatchMode):
    """Raises where an operation would wait for the device of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = devices((args, kwargs))
        if func in WAITS and given - {"cpu"}:
            raise AssertionError(f"{func} waits for the device")
        if func is aten.copy_.default:
            waits = args[0].device != args[1].device and (
                args[0].device.type == "cpu" or not asynchronous(args, 2, kwargs)
            )
        elif func is aten._to_copy.default:
            to = torch.device((kwargs or {}).get("device") or args[0].device)
            waits = args[0].device != to and (to.type == "cpu" or not asynchronous(args, 1, kwargs))
        elif func is aten._index_put_impl_.default or func is aten.index.Tensor:
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            waits = any(t.dtype in (torch.bool, torch.uint8) and t.device.type != "cpu" for t in indices)
        elif func is aten._fused_adam_.tensor_lr:
            return None  # in place, and torch has no kernel of it for the meta device
        else:
            waits = False
        if waits:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class NoTensorOnADevice(TorchFunctionMode):
    """Raises where ``torch.tensor`` copies numbers to a device, which no dispatch mode sees on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise AssertionError(f"torch.{func.__name__} waits for the device")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "work",
    [
        lambda t: t.item(),
        lambda t: bool(t > 0),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.to("cpu"),
        lambda t: torch.empty(()).copy_(t),
        lambda t: t.copy_(torch.ones(())),
        lambda t: torch.ones(()).to("meta"),
        lambda t: torch.tensor([1.0], device="meta"),
    ],
)
def test_the_mode_sees_what_waits(work):
    with pytest.raises(AssertionError, match="waits for the device"), NoWait(), NoTensorOnADevice():
        work(torch.empty((), device="meta"))


def test_the_mode_lets_the_host_work():
    with NoWait(), NoTensorOnADevice():
        assert float(torch.ones(())) == 1.0
        torch.tensor([1.0, 2.0]).to("meta", non_blocking=True)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize(
    ("layout", "world", "weights"),
    [
        ("whole", 1, torch.bfloat16),
        ("fsdp2", 3, torch.bfloat16),
        ("fsdp1", 3, torch.float32),
        ("zero2", 3, torch.float32),
        ("zero3", 3, torch.float32),
    ],
)
def test_no_step_waits(layout, world, weights, kind, kernels, monkeypatch):
    """Steps with and without a redraw, with the learning rate as a number and as a tensor on the device."""
    if kernels == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from layouts import make_step, one_rank

    for cache in (True, "auto"):
        options = {"rank": 1 if kind == "tensor" else 8, "scale_type": kind, "cache_projection": cache}
        options |= {"update_proj_gap": 2, "weight_decay": 0.1, "kernels": kernels}
        if weights == torch.bfloat16 and kind == "channel" and cache == "auto":
            options |= {"stochastic_rounding": True, "adam_dtype": "bfloat16"}
        with one_rank(layout, world):
            model = meta_model(ModelConfig(64, 48, 80, 2, 4))
            take, elements, groups = make_step(model, layout, world, weights, torch.bfloat16, options)
            assert elements["matrices"] and elements["rest"]
            take()  # the first one reads the layouts
            with NoWait(), NoTensorOnADevice():
                for lr in (1e-2, torch.tensor(1e-2), torch.empty((), device="meta")):
                    for group in groups:
                        group["lr"] = lr
                    take()
                    take()
                if layout == "whole":  # a matrix of a batch, and a tensor of AdamW's, without a gradient
                    for group in groups:
                        group["params"][1].grad = None
                    take()


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_step_of_int8_weights_waits(kernels):
    """And Triton's launches do not grow with a model's depth."""
    pytest.importorskip("torchao", reason="torchao is an extra: pip install 'apollo-dist[quantized]'")
    if kernels == "triton":
        pytest.importorskip("triton")
    launches = []
    for layers in (2, 4):
        model = meta_model(ModelConfig(64, 48, 80, layers, 4)).to(torch.bfloat16)
        quantized(model.model)
        optimizer = APOLLO(model, rank=8, update_proj_gap=2, weight_decay=0.1, kernels=kernels)
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(costs, "LISTENERS", [lambda cost, told=told: told.append(cost.name)])
            for step in range(3):
                for p in model.parameters():
                    p.grad = torch.empty(p.shape, dtype=torch.bfloat16, device="meta")
                if not step:  # reads the layouts
                    optimizer.step()
                    told.clear()
                    continue
                with NoWait(), NoTensorOnADevice():
                    optimizer.step()
        launches.append(sorted(told))
    assert launches[0] == launches[1]
    assert ("apply_rows" in launches[0]) == (kernels == "triton")
