"""APOLLO for sharded training: exact under DeepSpeed ZeRO and PyTorch FSDP."""

from . import checkpoint, hugging_face, layerwise, projection
from ._version import __version__
from .deepspeed import register
from .groups import param_groups
from .optimizer import APOLLO, APOLLOMini

register(APOLLO, APOLLOMini)
hugging_face.register(APOLLO, APOLLOMini)

__all__ = ["APOLLO", "APOLLOMini", "__version__", "checkpoint", "layerwise", "param_groups", "projection"]
