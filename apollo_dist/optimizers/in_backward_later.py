"""Updates inside backward for a model that is sharded only after its optimizer was built.

Hugging Face's ``Trainer`` builds the optimizer first, makes a scheduler for it, and lets ``Accelerator.prepare`` apply
FSDP2, which replaces the parameters. So the hooks wait for the sharded model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..sharding import fsdp2
from .apollo import APOLLO
from .base import ShardedOptimizer
from .layerwise import UpdatesInBackward


class TrainerLayerwiseAPOLLO(UpdatesInBackward, APOLLO):
    """APOLLO that updates inside backward, in the form in which the ``Trainer`` builds optimizers.

    Args:
        params: parameter groups with (name, parameter) pairs.
        module: the model that they belong to.
        wait: add the hooks when FSDP2 has sharded the model, which ``attach`` tells; else at once.
        options: as of ``APOLLO``.

    Raises:
        ValueError: as of ``layerwise.attach``; with ``wait``, from ``attach``.
    """

    def __init__(self, params: Any, *, module: nn.Module, wait: bool = False, **options: Any) -> None:
        self._waits = wait and not fsdp2.reduced_together(module)
        super().__init__(module, params, **options)

    def _drive(self, model: nn.Module) -> None:
        if not self._waits:
            super()._drive(model)

    def _attach_model(self, model: nn.Module, strict: bool) -> None:
        if not self._waits:
            super()._attach_model(model, strict)
            return
        ShardedOptimizer._attach_model(self, model, strict)
        if fsdp2.reduced_together(model):
            self._waits = False
            self._drive(model)

    def _release_parameters(self) -> None:
        if self._waits:
            ShardedOptimizer._release_parameters(self)
        else:
            super()._release_parameters()
