"""Triton kernels over many matrices a launch; the same names and signatures as ``kernels.reference``.

They run on whatever Triton compiles for, and on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``), which the
tests use. Nothing here is tuned at run time: block sizes follow from shapes, and each file says how.
"""

from .adamw import adamw
from .add_up import add_up
from .apply import apply
from .apply_rows import apply_rows
from .draw import draw, draw_signs
from .moments import moments
from .project import project

__all__ = ["adamw", "add_up", "apply", "apply_rows", "draw", "draw_signs", "moments", "project"]
