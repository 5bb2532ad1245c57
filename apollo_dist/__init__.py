"""APOLLO for sharded training: exact under DeepSpeed ZeRO and PyTorch FSDP."""

from . import checkpoint, hugging_face, layerwise, projection
from ._version import __version__
from .distributed import RankError
from .integrations.deepspeed import register
from .integrations.hugging_face import register as register_hugging_face
from .optimizers.adam_mini import AdamMini
from .optimizers.adamw import AdamW
from .optimizers.apollo import APOLLO, APOLLOMini
from .optimizers.galore import Fira, GaLore
from .optimizers.muon import Muon
from .optimizers.param_groups import param_groups
from .optimizers.scale import SCALE
from .optimizers.sgd import SGD
from .selection.describe import describe

# AdamW, SGD and Muon are names of torch's or DeepSpeed's own in DeepSpeed's JSON.
register(APOLLO, APOLLOMini, GaLore, Fira, SCALE, AdamMini, unnamed=(AdamW, SGD, Muon))
register_hugging_face(APOLLO, APOLLOMini, GaLore, Fira, SCALE, AdamMini, AdamW, SGD, Muon)

__all__ = [
    "APOLLO",
    "SCALE",
    "SGD",
    "APOLLOMini",
    "AdamMini",
    "AdamW",
    "Fira",
    "GaLore",
    "Muon",
    "RankError",
    "__version__",
    "checkpoint",
    "describe",
    "hugging_face",
    "layerwise",
    "param_groups",
    "projection",
]
