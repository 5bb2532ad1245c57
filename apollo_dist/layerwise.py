"""Updates inside backward, under the module name of version 0.1 (see ``optimizers.in_backward``)."""

from .optimizers.in_backward import LayerwiseAPOLLO, LayerwiseAPOLLOMini, attach

__all__ = ["LayerwiseAPOLLO", "LayerwiseAPOLLOMini", "attach"]
