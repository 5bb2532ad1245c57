"""What DDP and FSDP2 share: PyTorch's own backward, clipping, step and local state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apollo_dist.pretrain.batching import BatchPlan
from apollo_dist.pretrain.config import Config
from apollo_dist.pretrain.distributed import Ranks
from apollo_dist.pretrain.optimizers import build_optimizer, local, schedule


class NativeEngine:
    """Base of the engines that leave the loop to PyTorch; a subclass wraps the model and says when to reduce."""

    def __init__(self, config: Config, plan: BatchPlan, wrapped: nn.Module, ranks: Ranks) -> None:
        self.module = wrapped
        self.optimizer = build_optimizer(config.optimizer, wrapped, config.seed)
        self._scheduler = schedule(config)(self.optimizer)
        self._clip = config.gradient_clipping
        self._accumulation = plan.accumulation
        self._ranks = ranks

    def train(self, mode: bool) -> None:
        """See `Engine`."""
        self.module.train(mode)

    def logits(self, tokens: Tensor) -> Tensor:
        """See `Engine`."""
        output: Tensor = self.module(input_ids=tokens).logits
        return output

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def update(self) -> bool:
        """See `Engine`."""
        norm = gradient_norm(self.module)
        finite = math.isfinite(norm)
        if finite:
            if self._clip:
                nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
            self.optimizer.step()
        self._scheduler.step()
        self.optimizer.zero_grad()
        return finite

    def save(self, folder: Path) -> None:
        """See `Engine`. DDP's weights are the same on all ranks: one file; a shard is its rank's own."""
        weights = {name: local(tensor) for name, tensor in self.module.state_dict().items()}
        sharded = any(isinstance(p, DTensor) for p in self.module.parameters())
        if sharded or self._ranks.first:
            torch.save(weights, self._weights_file(folder, sharded))
        state = {"optimizer": localize(self.optimizer.state_dict()), "scheduler": self._scheduler.state_dict()}
        torch.save(state, self._optimizer_file(folder))

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        sharded = any(isinstance(p, DTensor) for p in self.module.parameters())
        weights = torch.load(self._weights_file(folder, sharded), map_location="cpu", weights_only=True)
        held = self.module.state_dict()
        if weights.keys() != held.keys():
            raise ValueError(f"the checkpoint {folder} holds other parameters than this model")
        with torch.no_grad():
            for name, tensor in held.items():
                local(tensor).copy_(weights[name])
        state = torch.load(self._optimizer_file(folder), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(globalize(state["optimizer"], self.optimizer))
        self._scheduler.load_state_dict(state["scheduler"])

    def _weights_file(self, folder: Path, sharded: bool) -> Path:
        return folder / (f"weights_rank_{self._ranks.rank:05d}.pt" if sharded else "weights.pt")

    def _optimizer_file(self, folder: Path) -> Path:
        return folder / f"optimizer_rank_{self._ranks.rank:05d}.pt"


def gradient_norm(module: nn.Module) -> float:
    """The norm of all gradients, those of a sharded model over all ranks; the same on every rank."""
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def localize(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with each DTensor replaced by {"local": its local tensor}."""
    state = {
        index: {k: {"local": v.to_local()} if isinstance(v, DTensor) else v for k, v in entry.items()}
        if isinstance(entry, dict)
        else entry
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def globalize(state_dict: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Undo `localize`: the DTensors are laid out like the parameters that the state belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def whole(index: int, value: Any) -> Any:
        if not (isinstance(value, dict) and value.keys() == {"local"}):
            return value
        like = parameters[index]
        return DTensor.from_local(
            value["local"].to(like.device), like.device_mesh, like.placements,
            run_check=False, shape=like.shape, stride=like.stride(),
        )  # fmt: skip

    state = {
        index: {k: whole(index, v) for k, v in entry.items()} if isinstance(entry, dict) else entry
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
