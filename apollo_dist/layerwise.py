"""Updates inside backward: ``apollo_dist.layerwise.attach(model)``. ``optimizers.in_backward`` drives them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .optimizers.apollo import APOLLO, APOLLOMini
from .optimizers.base import ShardedOptimizer
from .optimizers.layerwise import UpdatesInBackward

__all__ = ["LayerwiseAPOLLO", "LayerwiseAPOLLOMini", "attach"]


def attach(
    model: nn.Module,
    params: Any = None,
    *,
    mini: bool = False,
    optimizer: type[ShardedOptimizer] | None = None,
    **options: Any,
) -> UpdatesInBackward:
    """An optimizer, by default APOLLO, that updates ``model`` inside ``backward()``.

    Works in one process and under FSDP2 (and HSDP); shard the model first. The trajectory is that of ``APOLLO``::

        optimizer = layerwise.attach(model, lr=1e-2, rank=256)
        loss.backward()  # every layer is updated, and its gradients are freed
        optimizer.step()  # ends the step

    Options, such as the learning rate, are read while ``backward()`` runs; schedulers and ``apollo_dist.checkpoint``
    work as with ``APOLLO``, between ``step()`` and the next ``backward()``.

    Args:
        model: whose parameters are updated.
        params: parameter groups, as ``APOLLO`` takes them; None: those of the model, as ``APOLLO(model)``.
        mini: take the defaults of ``APOLLOMini``.
        optimizer: another optimizer of this library, such as ``apollo_dist.SCALE``.
        options: as of ``APOLLO``, or of that optimizer.

    Raises:
        ValueError: on all ranks alike, for what cannot be exact: DDP, FSDP1, DeepSpeed, several ranks with whole
            parameters, fp16 (which needs a scaled loss), ``skip_nonfinite``.
    """
    if optimizer is not None and mini:
        raise ValueError("mini=True is for APOLLO: leave it out, or optimizer=")
    kind = layerwise(optimizer or (APOLLOMini if mini else APOLLO))
    return kind(model, params, **options)


def layerwise(optimizer: type[ShardedOptimizer]) -> type[UpdatesInBackward]:
    """The class of an optimizer that updates inside backward; made once for each.

    Args:
        optimizer: a class of this library, or one made of ``ShardedOptimizer``.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(optimizer, type) or not issubclass(optimizer, ShardedOptimizer):
        raise ValueError(f"optimizer must be one of apollo_dist's classes, got {optimizer!r}")
    if optimizer not in _KINDS:
        name, doc = f"Layerwise{optimizer.__name__}", {"__doc__": optimizer.__doc__}
        _KINDS[optimizer] = type(name, (UpdatesInBackward, optimizer), doc)
    return _KINDS[optimizer]


class LayerwiseAPOLLO(UpdatesInBackward, APOLLO):
    """``APOLLO`` that updates inside backward."""


class LayerwiseAPOLLOMini(LayerwiseAPOLLO, APOLLOMini):
    """``LayerwiseAPOLLO`` with the defaults of ``APOLLOMini``."""


# By optimizer its class that updates inside backward, made when it is asked for.
_KINDS: dict[type[ShardedOptimizer], type[UpdatesInBackward]] = {
    APOLLO: LayerwiseAPOLLO,
    APOLLOMini: LayerwiseAPOLLOMini,
}
