"""What is refused before a hook is added: models, options and parameters whose updates inside backward are inexact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from ..sharding import dtensor, fsdp1
from ..sharding.deepspeed import zero_engine
from ..sharding.internals import version_of

# Updates inside backward under FSDP2 were wrong with torch 2.6 (on CPUs), and right with 2.8; 2.7 was not run.
FSDP2_SINCE = "2.8"


class GradientHook:
    """Post-accumulate-grad hook. A named class, so that ``check_parameter`` detects another optimizer's hook."""

    def __init__(self, ready: Callable[[Tensor], None]) -> None:
        self._ready = ready

    def __call__(self, tensor: Tensor) -> None:
        self._ready(tensor)


def no_fp16(what: str) -> str:
    return (
        f"{what}, so gradients are scaled and may overflow, which is known only after all of them have been used: "
        "updates inside backward cannot be exact. Use bfloat16"
    )


def check_model(model: Any, options: dict[str, Any]) -> None:
    """Raise ValueError if updates inside backward cannot be exact for a model, or with an option."""
    if zero_engine.is_engine(model):
        raise ValueError(zero_engine.NOT_IN_BACKWARD)
    if not isinstance(model, nn.Module):
        raise ValueError(f"layerwise.attach needs the model, a torch.nn.Module; got {type(model).__name__}")
    if options.get("skip_nonfinite"):
        raise ValueError(
            "skip_nonfinite looks at all gradients before any weight changes, and inside backward most weights have "
            "changed when the last gradient is known: leave it out, and look at the loss before backward()"
        )
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{name or 'the model'} is wrapped in DistributedDataParallel, where gradients are ready before they "
                "are averaged over the ranks. Use FSDP2 (fully_shard), or in one process the bare model"
            )
        if any(map(fsdp1.is_flattened, module.parameters(recurse=False))):
            raise ValueError(
                f"{name or 'the model'} is sharded by FSDP1, which never tells when a parameter's gradient is ready. "
                "Use FSDP2 (fully_shard)"
            )
    # Unsharded copies that an evaluation left behind would be taken for the parameters.
    dtensor.reshard(model)


def check_parameter(name: str, parameter: Tensor, sharded: bool, world: int) -> None:
    """Raise ValueError if a parameter's gradient is not the step's when it is ready.

    Args:
        name: for the message.
        parameter: whole or a DTensor.
        sharded: whether FSDP2 reduces its gradient.
        world: how many ranks train it.
    """
    hooks: Sequence[Any] = list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())
    if any(isinstance(hook, GradientHook) for hook in hooks):
        raise ValueError(
            f"{name} is updated inside backward by another optimizer already, and would be by both; detach() that first"
        )
    if hasattr(parameter, "ds_id"):
        raise ValueError(zero_engine.NOT_IN_BACKWARD)
    if sharded and TorchVersion(torch.__version__) < FSDP2_SINCE:
        raise ValueError(
            f"updates inside backward under FSDP2 with torch {version_of('torch')}: they were seen to be wrong with "
            f"2.6. Install torch {FSDP2_SINCE} or later, or use APOLLO"
        )
    if parameter.dtype == torch.float16:
        raise ValueError(no_fp16(f"{name} is float16"))
    if not sharded and (world > 1 or dtensor.is_dtensor(parameter)):
        raise ValueError(
            f"{name} is not sharded by FSDP2, and {world} ranks train it: nothing averages its gradient before it is "
            "used. Shard the whole model with fully_shard; for ranks that train on their own pass process_group"
        )
