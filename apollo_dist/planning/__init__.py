"""What a run needs, before it starts: ``python -m apollo_dist plan RECIPE``.

``docs/planning.md`` says how every number is derived, and what is not counted.
"""

from .memory import Forecast, Memory, forecast
from .options import ENGINES, Options

__all__ = ["ENGINES", "Forecast", "Memory", "Options", "forecast"]
