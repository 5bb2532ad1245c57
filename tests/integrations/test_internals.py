"""Names of torch and DeepSpeed that are not public: one that is missing is an error that names the version."""

import types

import pytest
import torch
from torch import nn

from apollo_dist.integrations.deepspeed_config.faults import ADDED, FAULTS, known_faults, not_yet
from apollo_dist.integrations.deepspeed_config.lint import check
from apollo_dist.integrations.deepspeed_config.unsupported import unsupported
from apollo_dist.sharding import fsdp2, internals
from apollo_dist.sharding.deepspeed import zero, zero_engine


def test_a_missing_name_is_told_with_its_owner_and_the_version():
    told = rf"torch {torch.__version__.split('+')[0]}.*: torch.nn.*Linear has no _no_such_name, which APOLLO reads"
    with pytest.raises(internals.UnknownInternals, match=told):
        internals.require(nn.Linear(1, 1), "weight", "_no_such_name")
    with pytest.raises(internals.UnknownInternals, match="has no _one or _other"):
        internals.first_of(torch, "_one", "_other")
    assert internals.first_of(nn.Linear(1, 1), "_one", "in_features") == 1


@pytest.mark.parametrize("spelling", ["_fsdp_param_groups", "_fsdp_param_group"])
def test_fsdp2s_groups_in_either_spelling(spelling):
    group = types.SimpleNamespace(fsdp_params=[], reduce_grads=True, all_reduce_grads=True)
    state = types.SimpleNamespace(**{spelling: [group] if spelling.endswith("s") else group})
    module = types.SimpleNamespace(_get_fsdp_state=lambda: state)
    assert fsdp2._groups_of(module) == [group]
    state = types.SimpleNamespace(**{spelling: [] if spelling.endswith("s") else None})
    assert fsdp2._groups_of(module) == []
    del state.__dict__[spelling]
    with pytest.raises(internals.UnknownInternals, match="has no _fsdp_param_groups or _fsdp_param_group"):
        fsdp2._groups_of(module)


def test_a_wrapper_that_is_not_known_is_an_error():
    class Wrapper:
        pass

    with pytest.raises(internals.UnknownInternals, match="'s Wrapper; install a version of the table"):
        zero.read(Wrapper(), torch.ones(1), lambda tensor: "name")
    with pytest.raises(internals.UnknownInternals, match="Wrapper does not say how to give the model"):
        zero_engine.update_model(Wrapper())
    zero_engine.update_model(None)


def config(stage: int, accumulation: int, **zero_optimization) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero_optimization},
    }


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAST = "only the last of several micro-batches"
MIDDLE = "only the first and the last of more than two"
# version, configuration, what is said of it
FAULTY = [
    ("0.17.5", config(2, 2), None),
    ("0.17.6", config(2, 2), LAST),
    ("0.18.1+cu128", config(2, 2), LAST),
    ("0.18.2", config(2, 4), LAST),
    ("0.18.3", config(2, 2), None),
    ("0.18.2", config(2, 1), None),
    ("0.18.2", config(1, 2), None),
    ("0.18.2", config(3, 2), None),
    ("0.18.2", config(2, 2, **OFFLOAD), None),
    ("0.16.0", config(2, 3, **OFFLOAD), MIDDLE),
    ("0.18.9", config(2, 3, **OFFLOAD), MIDDLE),
    ("0.18.9", config(2, 2, **OFFLOAD), None),
    ("0.18.9", config(1, 3, **OFFLOAD), None),
    ("0.19.0", config(2, 3, **OFFLOAD), None),
    ("0.19.8", config(2, 3, **OFFLOAD), None),
    (None, config(2, 3, **OFFLOAD), None),
]


@pytest.mark.parametrize(("version", "given", "said"), FAULTY)
def test_faults_of_deepspeed_versions(version, given, said):
    found = list(known_faults(given, version))
    assert len(found) == (said is not None)
    if said and version:
        assert said in found[0]
        assert f"DeepSpeed {version} is wrong here with every optimizer" in found[0]
        assert found[0] in unsupported(given, version)
        assert found[0] in check(given, deepspeed=version)


def test_accumulation_that_follows_from_the_batch_sizes():
    given = {**config(2, 1), "train_batch_size": 8}
    del given["gradient_accumulation_steps"]
    assert any(LAST in line for line in check(given, world=2, deepspeed="0.18.2"))
    assert not any(LAST in line for line in check(given, world=8, deepspeed="0.18.2"))


def test_settings_that_a_version_does_not_read_yet():
    given = {"bf16": {"enabled": True, "bf16_optimizer_states": True}, "torch_autocast": {"enabled": True}}
    said = [line.partition(":")[0] for line in not_yet(given, "0.16.9")]
    assert said == ["bf16.bf16_optimizer_states", "torch_autocast"]
    assert list(not_yet(given, "0.18.3")) == list(not_yet(given, None)) == []
    assert "install 0.17.2 or later" in next(line for line in not_yet(given, "0.17.1") if "autocast" in line)
    assert all(first and "." in first for first in ADDED.values())
    assert all(fault.remedy and fault.reason for fault in FAULTS)


def test_an_engine_with_a_fault_is_refused(monkeypatch):
    """As the optimizer asks when an engine is initialized."""
    from apollo_dist.integrations import deepspeed
    from apollo_dist.integrations.deepspeed_config import unsupported as module

    monkeypatch.setattr(module, "installed", lambda: "0.18.1")
    monkeypatch.setattr(zero, "unsupported", lambda driver: [])
    given = config(2, 1)
    del given["gradient_accumulation_steps"]  # which DeepSpeed derives
    engine = types.SimpleNamespace(
        _config=types.SimpleNamespace(_param_dict=given), gradient_accumulation_steps=lambda: 4
    )
    with pytest.raises(ValueError, match=LAST):
        deepspeed.refuse(engine)
