"""APOLLO for sharded training: exact under DeepSpeed ZeRO and PyTorch FSDP."""

from . import checkpoint, hugging_face, layerwise, projection
from ._version import __version__
from .distributed import RankError
from .integrations.deepspeed import register
from .integrations.hugging_face import register as register_hugging_face
from .optimizers.adam_mini import AdamMini
from .optimizers.adamw import AdamW
from .optimizers.apollo import APOLLO, APOLLOMini
from .optimizers.by_name import BY_NAME
from .optimizers.galore import Fira, GaLore
from .optimizers.muon import Muon
from .optimizers.param_groups import param_groups
from .optimizers.scale import SCALE
from .optimizers.sgd import SGD
from .selection.describe import describe

register(BY_NAME)
register_hugging_face(*BY_NAME.values())

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
