"""APOLLO for sharded training: exact under DeepSpeed ZeRO and PyTorch FSDP."""

from . import checkpoint, layerwise, projection
from ._version import __version__
from .integrations import hugging_face
from .integrations.deepspeed import register
from .optimizers.base import APOLLO, APOLLOMini
from .optimizers.param_groups import param_groups

register(APOLLO, APOLLOMini)
hugging_face.register(APOLLO, APOLLOMini)

__all__ = ["APOLLO", "APOLLOMini", "__version__", "checkpoint", "layerwise", "param_groups", "projection"]
