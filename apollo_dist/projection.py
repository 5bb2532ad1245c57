"""Gaussian projections, under the module name of version 0.1 (see ``projections.gaussian``)."""

from .projections.gaussian import gaussian

__all__ = ["gaussian"]
