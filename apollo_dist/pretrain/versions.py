"""What a process runs on: versions of software, the package's code, the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import apollo_dist

PACKAGE = Path(apollo_dist.__file__).resolve().parent
ABSENT = "none"


def versions() -> dict[str, str]:
    """Versions that must be equal on all ranks, by name; ``none`` for what is missing."""
    found = {
        "python": platform.python_version(),
        "apollo_dist": apollo_dist.__version__,
        "apollo_dist code": code_digest(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or ABSENT,
        "driver": driver(),
    }
    for name in ("deepspeed", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    if torch.version.cuda and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def code_digest() -> str:
    """12 hexadecimal digits of the SHA-256 of the package's Python files and recipes: a checkout has no version."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def driver() -> str:
    """Version of NVIDIA's kernel driver, as the kernel module says."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)*\b", path.read_text()) if path.exists() else None
    return found.group() if found else ABSENT


def node() -> str:
    """The name of this machine: SLURM's, or the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def revision() -> dict[str, object] | None:
    """Commit of the repository that the package is part of, and whether files differ from it; None if it is in none."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # an environment inside another repository is no part of it
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()
