"""Which extra of this package brings a module that is not installed, for messages."""

from __future__ import annotations

import importlib.util

# Module -> the extra of setup.py that brings it; for what several bring, the smallest.
EXTRAS = {
    "accelerate": "huggingface",
    "datasets": "pretrain",
    "deepspeed": "deepspeed",
    "lightning": "lightning",
    "matplotlib": "plot",
    "safetensors": "pretrain",
    "tokenizers": "pretrain",
    "torchao": "quantized",
    "tqdm": "pretrain",
    "transformers": "pretrain",
}


def not_installed(*modules: str) -> str | None:
    """What to install for the first of these modules that is missing, in one line; None if all are there."""
    return next((_advice(module) for module in modules if not _exists(module)), None)


def after_failed_import(error: ImportError) -> str | None:
    """What to install after a failed import, in one line; None for a module that no extra brings."""
    module = (error.name or "").partition(".")[0]
    return _advice(module) if module in EXTRAS and not _exists(module) else None


def _advice(module: str) -> str:
    return f"{module} is not installed; it comes with an extra: pip install 'apollo-dist[{EXTRAS[module]}]'"


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
