"""Names of torch and DeepSpeed that are not public: one that is missing is an error that names the version."""

import types

import pytest
import torch
from torch import nn

from apollo_dist.integrations.deepspeed_config.lint import check
from apollo_dist.sharding import fsdp2, internals
from apollo_dist.sharding.deepspeed import faults, zero, zero_engine
from apollo_dist.sharding.deepspeed.faults import ADDED, FAULTS, known_faults, not_yet
from apollo_dist.sharding.deepspeed.unsupported import unsupported


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


def test_a_torch_that_does_not_say_what_it_sharded(monkeypatch):
    import torch.distributed.fsdp  # noqa: F401
    from torch.distributed import _composable_state

    from apollo_dist.sharding import dtensor

    monkeypatch.delattr(_composable_state, "_module_state_mapping")
    with pytest.raises(internals.UnknownInternals, match="_composable_state has no _module_state_mapping"):
        dtensor.sharded_modules()


def test_a_trainer_that_keeps_deepspeeds_json_elsewhere():
    from apollo_dist.integrations import trainer_optim

    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(optim="apollo_adamw"), accelerator=types.SimpleNamespace(state=object())
    )
    with pytest.raises(internals.UnknownInternals, match="object has no deepspeed_plugin, which APOLLO reads"):
        trainer_optim._check_json(lambda *_: None, trainer, 1)


@pytest.mark.parametrize(
    ("attributes", "refused"),
    [
        ({}, True),  # before 0.17.1
        ({"dtype": torch.float16}, False),
        ({"check_grad_overflow": True}, False),
        ({"check_grad_overflow": False}, True),
        ({"check_grad_overflow": False, "compute_grad_norm": True, "dtype": torch.bfloat16}, True),
        ({"check_grad_overflow": False, "single_partition_of_fp32_groups": [1]}, False),  # one call
        ({"fp32_partitioned_groups_flat": [1, 2]}, True),
        ({"fp32_partitioned_groups_flat": [1]}, False),
        ({"fp32_partitioned_groups_flat": [1, 2], "dtype": torch.float16}, False),
    ],
)
def test_steps_of_which_a_part_could_be_skipped(attributes, refused):
    wrapper = types.SimpleNamespace(**{"single_partition_of_fp32_groups": [1, 2], "dtype": torch.float32, **attributes})
    if not refused:
        zero_engine.check_skips(wrapper)
        return
    with pytest.raises(ValueError, match="for each of 2 parameter groups"):
        zero_engine.check_skips(wrapper)


def test_an_uneven_dim_of_several_axes_with_an_older_torch(monkeypatch):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    from apollo_dist.sharding import dtensor

    monkeypatch.setattr(dtensor, "UNEVEN_STRIDES", "99")
    mesh = types.SimpleNamespace(size=lambda axis: (2, 3)[axis])
    divided = (_StridedShard(0, split_factor=3), Shard(0))
    for rows in (12, 13):
        tensor = types.SimpleNamespace(device_mesh=mesh, placements=divided, shape=(rows, 5))
        if rows == 12:
            dtensor._check_strided(tensor, 0, 0)
            continue
        with pytest.raises(ValueError, match=r"dim 0 of shape \(13, 5\) unevenly into 6 pieces over several mesh axes"):
            dtensor._check_strided(tensor, 0, 0)


FP16, CHECKED = {"fp16": {"enabled": True}}, {"bf16": {"enabled": True, "check_grad_overflow": True}}


@pytest.mark.parametrize(
    ("version", "given", "faulty"),
    [
        ("0.17.0", {**FP16}, False), ("0.17.1", {**FP16}, True), ("0.18.1", {**CHECKED}, True),
        ("0.18.1", {"bf16": {"enabled": True}}, False), ("0.18.2", {**FP16}, False),
    ],
)  # fmt: skip
def test_overflow_that_only_one_rank_sees(version, given, faulty):
    for stage in (0, 1, 2, 3):
        found = [
            line for line in known_faults({**config(stage, 1), **given}, version) if "in its own gradients" in line
        ]
        assert len(found) == (faulty and stage == 1)


def test_gathers_on_cpus_one_at_a_time(monkeypatch, caplog):
    """Where DeepSpeed waits for the last of several only."""
    from apollo_dist.integrations import deepspeed

    def gathers(installed: str, device: str) -> list[list[int]]:
        class Init:
            def __init__(self):
                self.local_device, self.calls = torch.device(device), []

            def _allgather_params_coalesced(self, param_list, hierarchy=0):
                self.calls.append(list(param_list))

        monkeypatch.setattr(faults, "installed", lambda: installed)
        deepspeed._wait_for_every_gather(types.SimpleNamespace(Init=Init))
        init = Init()
        init._allgather_params_coalesced([1, 2, 3], hierarchy=0)
        init._allgather_params_coalesced([4])
        return init.calls

    with caplog.at_level("INFO", logger="apollo_dist"):
        assert gathers("0.19.4", "cpu") == [[1], [2], [3], [4]]
    assert caplog.text.count("ZeRO-3 on CPUs: parameters are gathered one at a time") == 1
    assert gathers("0.19.8", "cpu") == gathers("0.19.4", "cuda:0") == [[1, 2, 3], [4]]


SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("version", "stage", "given", "faulty"),
    [
        ("0.18.2", 0, FP16, False), ("0.18.3", 0, FP16, True), ("0.19.8", 0, FP16, True), ("0.19.8", 1, FP16, False),
        ("0.19.8", 0, {"fp16": {"enabled": True, "loss_scale": 1}}, False), ("0.19.8", 0, {"fp16": "auto"}, False),
        ("0.17.5", 0, BF16, False), ("0.17.6", 0, BF16, True), ("0.18.5", 0, BF16, True),
        ("0.18.6", 0, BF16, False), ("0.18.5", 2, BF16, False),
        ("0.18.4", 1, {**BF16, **SUMS}, True), ("0.18.5", 1, {**BF16, **SUMS}, False), ("0.18.4", 1, BF16, False),
    ],
)  # fmt: skip
def test_gradients_divided_by_a_scale_that_the_loss_never_had(version, stage, given, faulty):
    found = [line for line in known_faults({**config(stage, 1), **given}, version) if "divided by the loss" in line]
    assert len(found) == faulty
    assert all(line in unsupported({**config(stage, 1), **given}, version) for line in found)


def test_updates_inside_backward_with_an_older_torch(monkeypatch):
    from apollo_dist.optimizers import in_backward_checks as checks

    parameter = nn.Parameter(torch.ones(2))
    checks.check_parameter("p", parameter, sharded=False, world=1)
    monkeypatch.setattr(checks, "FSDP2_SINCE", "99")
    checks.check_parameter("p", parameter, sharded=False, world=1)
    with pytest.raises(ValueError, match="Install torch 99 or later"):
        checks.check_parameter("p", parameter, sharded=True, world=2)


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
    from apollo_dist.sharding.deepspeed import unsupported as module

    monkeypatch.setattr(module, "installed", lambda: "0.18.1")
    monkeypatch.setattr(zero, "unsupported", lambda driver: [])
    given = config(2, 1)
    del given["gradient_accumulation_steps"]  # which DeepSpeed derives
    engine = types.SimpleNamespace(
        _config=types.SimpleNamespace(_param_dict=given), gradient_accumulation_steps=lambda: 4
    )
    with pytest.raises(ValueError, match=LAST):
        zero_engine.check_supported(engine)
