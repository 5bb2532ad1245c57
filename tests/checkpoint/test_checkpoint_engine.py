"""Under DeepSpeed at the same world size a resumed run continues bit for bit, by its own checkpoints and by ours."""

from pathlib import Path

import pytest
import torch

from apollo_dist import APOLLO, checkpoint

from ..engines import full_weights, initialize, prepare, zero_config
from ..models import Bag, gradients, groups_of, low_rank, shapes_of
from ..ranks import run_ranks

GAP, BEFORE, AFTER = 4, 6, 4
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 1}}
SPLIT = {"stage3_param_persistence_threshold": 20, "sub_group_size": 300}
# (config, dtype of the model's weights)
CASES = {
    "zero0": (zero_config(0), torch.float32),
    "zero1": (zero_config(1), torch.float32),
    "zero2": (zero_config(2), torch.float32),
    "zero2 round robin": (zero_config(2, zero_optimization={"round_robin_gradients": True}), torch.float32),
    "zero3": (zero_config(3, zero_optimization=SPLIT), torch.float32),
    "zero3 bf16": (zero_config(3, zero_optimization=SPLIT, **BF16), torch.bfloat16),
    "zero3 fp16": (zero_config(3, zero_optimization=SPLIT, **FP16), torch.float16),
    "zero0 bf16": (zero_config(0, **BF16), torch.bfloat16),
    "zero1 bf16": (zero_config(1, **BF16), torch.bfloat16),
    "zero2 bf16": (zero_config(2, **BF16), torch.bfloat16),
    "BF16_Optimizer": (zero_config(1, **BF16, data_types={"grad_accum_dtype": "fp32"}), torch.bfloat16),
    "zero0 fp16": (zero_config(0, fp16={"enabled": True, "loss_scale": 1}), torch.float16),  # another one is refused
    "zero2 fp16": (zero_config(2, **FP16), torch.float16),
}
# Cases that load into an engine that has trained before: what it keeps between steps is out of date.
BETWEEN_STEPS = ("zero1 bf16", "zero2", "zero3", "zero3 fp16", "BF16_Optimizer")


def make(case: str, seed: int):
    """(model, engine, optimizer) of a case."""
    prepare()
    config, dtype = CASES[case]
    model = Bag(seed).to(dtype)
    optimizer = APOLLO(groups_of(model, low_rank(model, 3)), update_proj_gap=GAP, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 64)
    return model, initialize(model, config, optimizer=optimizer, lr_scheduler=schedule), optimizer


def train(engine, model, rank: int, steps: range) -> None:
    for step in steps:
        given = gradients(shapes_of(Bag()), step, rank, next(model.parameters()).dtype)
        engine.backward(engine(given))
        engine.step()


def weights(engine, model) -> dict[str, torch.Tensor]:
    """The whole weights, as the optimizer and as the model holds them."""
    deepspeed = prepare()
    found = {name: w.clone() for name, w in full_weights(engine, model).items()}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters(p, enabled=hasattr(p, "ds_id")):
            found[f"{name} in the model"] = p.detach().clone()
    return found


def differing(first: dict, second: dict) -> list[str]:
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def own_path(engine, optimizer, root: str, load: bool):
    """DeepSpeed's way."""
    if load:
        assert engine.load_checkpoint(root)[0] is not None
    else:
        engine.save_checkpoint(root)


def our_path(engine, optimizer, root: str, load: bool):
    """Ours; the schedule is the caller's to keep."""
    if load:
        found = checkpoint.load(root, engine)
        assert found.step == BEFORE
        engine.lr_scheduler.load_state_dict(found.extra["schedule"])
    else:
        checkpoint.save(root, engine, extra={"schedule": engine.lr_scheduler.state_dict()})


def resume(rank: int, world: int, root: str, ours: bool) -> dict[str, object]:
    """For each case what differs after resuming, and what the resumed optimizer holds."""
    move, results = our_path if ours else own_path, {}
    for case in CASES:
        folder = f"{root}/{case}"
        model, engine, optimizer = make(case, seed=0)
        train(engine, model, rank, range(BEFORE))
        move(engine, optimizer, folder, load=False)
        saved, counters = weights(engine, model), (engine.global_steps, engine.micro_steps, engine.global_samples)
        scale = getattr(engine.optimizer, "loss_scale", None)
        train(engine, model, rank, range(BEFORE, BEFORE + AFTER))
        straight = weights(engine, model)

        model, engine, optimizer = make(case, seed=1)
        if case in BETWEEN_STEPS:
            train(engine, model, rank, range(30, 32))
        move(engine, optimizer, folder, load=True)
        found = {"at once": differing(saved, weights(engine, model))}
        found["counters"] = ((engine.global_steps, engine.micro_steps, engine.global_samples), counters)
        found["scale"] = (getattr(engine.optimizer, "loss_scale", None), scale)
        found["lr"], found["steps"] = optimizer.param_groups[0]["lr"], engine.lr_scheduler.last_epoch
        train(engine, model, rank, range(BEFORE, BEFORE + AFTER))
        found["later"] = differing(straight, weights(engine, model))
        found["moved"] = len(differing(saved, straight))
        slots = optimizer.state_dict()["state"]
        found["dtypes"] = {str(slot[key].dtype) for slot in slots.values() for key in ("exp_avg", "exp_avg_sq")}
        found["numbers"] = sum(slot["exp_avg"].numel() for slot in slots.values())
        results[case] = found
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True], ids=["engine.save_checkpoint", "apollo_dist.checkpoint"])
def test_same_world_is_bit_exact(ours, tmp_path):
    model = Bag()
    ranks = low_rank(model, 3)
    whole = 0
    for name, p in Bag().named_parameters():
        channels = p.numel() // min(p.shape[-2:]) if name in ranks else 0
        whole += channels * ranks[name] if name in ranks else p.numel()
    results = run_ranks(resume, 2, str(tmp_path), ours)
    for case in CASES:
        for found in (result[case] for result in results):
            assert found["moved"] > 40, case
            assert found["at once"] == [], case
            assert found["later"] == [], case
            assert found["dtypes"] == {"torch.float32"}, case
            resumed, counted = found["counters"]
            assert (resumed[0], resumed[2]) == (counted[0], counted[2]), case
            assert not ours or resumed[1] == counted[1], case  # DeepSpeed itself does not restore its micro-steps
            assert found["scale"][0] == found["scale"][1], case
            assert found["lr"] == 0.01 * (1.0 - found["steps"] / 64), case
        numbers = [result[case]["numbers"] for result in results]
        assert sum(numbers) == (2 * whole if case.startswith("zero0") else whole), case
    if not ours:
        assert_files_hold_what_ranks_own(tmp_path / "zero2", whole)


def assert_files_hold_what_ranks_own(folder: Path, whole: int) -> None:
    """DeepSpeed's optimizer files together hold every number of state once."""
    files = sorted(folder.glob("*/*optim_states.pt"))
    assert len(files) == 2
    numbers = []
    for file in files:
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"]
        numbers.append(sum(slot["exp_avg"].numel() for slot in state.values()))
    assert sum(numbers) == whole
    assert max(numbers) < 0.7 * whole
