"""What a checkpoint keeps for Hugging Face: the model's configuration and the tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

FOLDER = "hf"


def files(module: Any, tokenizer: Any) -> dict[str, bytes]:
    """Contents of the files to keep, by their path in the checkpoint; none for a model that is not Hugging Face's.

    Args:
        module: the model, wrapped or not.
        tokenizer: a tokenizer with ``save_pretrained``, or None.

    Raises:
        ValueError: if the tokenizer cannot save itself.
    """
    while isinstance(inner := getattr(module, "module", getattr(module, "_orig_mod", None)), nn.Module):
        module = inner  # DDP's, torch.compile's
    config: Any = getattr(module, "config", None)
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
            path = Path(folder) / "config.json"
            about = json.loads(path.read_text(encoding="utf-8"))
            # Which class to build from it; FSDP2 gives the class a prefix.
            about["architectures"] = [type(module).__name__.removeprefix("FSDP")]
            path.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            generation = getattr(module, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
        if tokenizer is not None:
            if not hasattr(tokenizer, "save_pretrained"):
                raise ValueError(f"tokenizer must have save_pretrained, {type(tokenizer).__name__} has not")
            tokenizer.save_pretrained(folder)
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {f"{FOLDER}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in found}
