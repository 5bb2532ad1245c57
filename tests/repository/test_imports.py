"""Who may import whom beyond the order of folders (``test_floors.py``): what a file may know of those below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import apollo_dist

PACKAGE = Path(apollo_dist.__file__).parent
# Module prefix -> what of apollo_dist it may import (itself is always allowed).
ALLOWED = {
    "kernels": (),
    "kernels.philox": (),
    "kernels.triton": ("kernels.costs", "kernels.parts", "kernels.rounding", "kernels.transfer"),
    "rules.options": (),
    "rules.base": ("kernels.table", "rules.options"),
    "rules": ("kernels",),
    "projections.quantiles": ("kernels.transfer",),
    "projections.gaussian": ("projections.slices", "kernels", "projections.quantiles"),
    "projections": ("kernels",),
    "projections.slices": ("kernels.table",),
    "distributed": (),
    "sharding.names": (),
    "sharding.parameters": (),
    "sharding.regions": (),
    "sharding": ("distributed", "weights"),
    "weights": ("kernels.quantizer", "kernels.rounding"),
    "exchange.channels": ("sharding.regions",),
    "exchange.ownership": ("exchange.channels", "sharding.regions"),
    "exchange.buckets": ("exchange.channels", "exchange.ownership"),
    "exchange.plan": ("exchange.buckets", "exchange.channels", "exchange.ownership", "sharding.regions"),
    "exchange": ("distributed", "kernels.reference", "sharding.local_shard", "sharding.regions"),
    "step": ("distributed", "exchange", "kernels", "projections", "rules", "sharding", "state.slots"),
    "optimizers.options": ("rules",),
    "optimizers.parameters": ("sharding",),
    "selection": ("rules.roles", "sharding"),
    "optimizers.param_groups": ("optimizers.options", "optimizers.parameters", "rules", "selection"),
    "state.slots": (),
    "state.callers": (),
    "state.identity": ("sharding.names",),
    "state.loaded": ("state",),
    "state.owned_tensor": ("distributed", "sharding.internals", "sharding.regions"),
    "state.reshard": ("exchange", "rules.base", "sharding", "state.owned_tensor", "state.slots", "step.matrix"),
    "state": (
        "distributed",
        "exchange",
        "rules.base",
        "sharding",
        "step.elementwise",
        "step.matrix",
        "step.plan",
        "step.shard_group",
    ),
    "integrations.import_hooks": (),
    "integrations.deepspeed": ("distributed", "integrations", "sharding", "weights"),
    "sharding.deepspeed.faults": (),
    "sharding.deepspeed.unsupported": ("sharding.deepspeed.faults",),
    "integrations.extras": (),
    "integrations.hugging_face": ("integrations.import_hooks", "integrations.trainer_optim", "sharding"),
    "planning": ("exchange", "optimizers", "pretrain", "rules", "selection", "sharding", "step"),
    "preflight": ("pretrain",),
}
PUBLIC = {
    "apollo_dist",
    "apollo_dist.distributed",
    "apollo_dist.checkpoint",
    "apollo_dist.sharding.deepspeed.faults",
    "apollo_dist.integrations.extras",
    "apollo_dist.layerwise",
    "apollo_dist.optimizers.param_groups",
    "apollo_dist.projection",
    "apollo_dist.kernels.philox",
    "apollo_dist.kernels.quantizer",
    "apollo_dist.weights.int8",
}
NO_DISTRIBUTED = (
    "kernels",
    "kernels.triton",
    "rules",
    "projections",
    "sharding.regions",
    "exchange.plan",
    "exchange.buckets",
    "exchange.packing",
    "exchange.replies",
    "exchange.routes",
    "step.apply",
    "step.batch",
    "step.elementwise",
    "step.matrix",
    "step.own",
    "step.reduce",
    "step.run",
    "step.shard_group",
)


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports."""
    module = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = module if path.name == "__init__.py" else module[:-1]
    package = package[:-1] if path.name == "__init__.py" else package
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def files(prefix: str) -> list[Path]:
    path = PACKAGE / prefix.replace(".", "/")
    return [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.glob("*.py"))


@pytest.mark.parametrize("prefix", ALLOWED)
def test_imports_go_down_only(prefix):
    allowed = tuple(f"apollo_dist.{name}" for name in (prefix, *ALLOWED[prefix]))
    for path in files(prefix):
        for name in imports(path):
            if name.startswith("apollo_dist."):
                assert name.startswith(allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("prefix", NO_DISTRIBUTED)
def test_no_communication_outside_of_exchange(prefix):
    for path in files(prefix):
        assert not any(name.startswith("torch.distributed") for name in imports(path)), path


def test_pretrain_uses_public_names_only():
    for path in sorted((PACKAGE / "pretrain").rglob("*.py")):
        for name in imports(path):
            if name.startswith("apollo_dist") and not name.startswith("apollo_dist.pretrain"):
                module = name if name in PUBLIC else name.rpartition(".")[0]
                assert module in PUBLIC, f"{path} imports {name}"


def test_engines_are_not_imported():
    """``import apollo_dist`` needs neither DeepSpeed nor transformers."""
    engines = ("deepspeed", "transformers", "datasets", "accelerate", "lightning")
    code = f"import sys, apollo_dist; print([m for m in {engines} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
