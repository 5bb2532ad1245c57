"""Checkpoints that load at any number of ranks and under any engine, and that are complete or absent.

See ``contents`` for what is in one, ``folder`` for how it lies on disk.
"""

from .loading import CheckpointWarning, Found, Loaded, find, load
from .saving import Pending, save

__all__ = ["CheckpointWarning", "Found", "Loaded", "Pending", "find", "load", "save"]
