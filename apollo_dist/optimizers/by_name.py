"""The names under which DeepSpeed's JSON knows the optimizers: ``"optimizer": {"type": "APOLLO", ...}``.

AdamW, SGD and Muon are names of DeepSpeed's or torch's own optimizers there, so that ours have longer ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adam_mini import AdamMini
from .adamw import AdamW
from .apollo import APOLLO, APOLLOMini
from .galore import Fira, GaLore
from .muon import Muon
from .scale import SCALE
from .sgd import SGD

if TYPE_CHECKING:
    from .base import ShardedOptimizer

BY_NAME: dict[str, type[ShardedOptimizer]] = {
    **{kind.__name__: kind for kind in (APOLLO, APOLLOMini, GaLore, Fira, SCALE, AdamMini)},
    **{f"ApolloDist{kind.__name__}": kind for kind in (Muon, SGD, AdamW)},
}
