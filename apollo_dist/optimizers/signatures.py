"""What signatures of optimizers share: classes that differ from others in defaults only, and AdamW's learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


def with_defaults(**defaults: Any) -> Callable[[type[T]], type[T]]:
    """A class decorator: the constructor that the class inherits, with other defaults, which its signature shows.

    Raises:
        TypeError: if one of them is no keyword-only argument of the constructor.
    """

    def decorate(cls: type[T]) -> type[T]:
        inherited: Callable[..., None] = cls.__init__
        signature = inspect.signature(inherited)
        parameters = dict(signature.parameters)
        for name, value in defaults.items():
            if name not in parameters or parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise TypeError(f"{cls.__name__} has no keyword-only argument {name}")
            parameters[name] = parameters[name].replace(default=value)

        @wraps(inherited)
        def construct(self: T, *args: Any, **kwargs: Any) -> None:
            inherited(self, *args, **{**defaults, **kwargs})

        construct.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[assignment]
        return cls

    return decorate


def ratio(adam_lr: Any, lr: Any) -> Any:
    """What of ``lr`` the learning rate of AdamW is; as given where that makes no sense, for the errors of options."""
    try:
        return float(adam_lr) / float(lr)
    except (TypeError, ValueError, ZeroDivisionError):
        return adam_lr
