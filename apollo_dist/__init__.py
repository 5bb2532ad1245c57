"""APOLLO for sharded training: exact under DeepSpeed ZeRO and PyTorch FSDP."""

from . import checkpoint, hugging_face, layerwise, projection
from ._version import __version__
from .distributed import RankError
from .integrations.deepspeed import register
from .integrations.hugging_face import register as register_hugging_face
from .optimizers.apollo import APOLLO, APOLLOMini
from .optimizers.param_groups import param_groups
from .selection.describe import describe

register(APOLLO, APOLLOMini)
register_hugging_face(APOLLO, APOLLOMini)

__all__ = [
    "APOLLO",
    "APOLLOMini",
    "RankError",
    "__version__",
    "checkpoint",
    "describe",
    "hugging_face",
    "layerwise",
    "param_groups",
    "projection",
]
