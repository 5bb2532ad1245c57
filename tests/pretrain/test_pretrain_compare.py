"""``python -m apollo_dist.pretrain.compare``: real small runs, what is repeated, and the table."""

import json
import re
import shutil

import pytest

from apollo_dist.pretrain import compare

SMALL = (
    "--recipe tiny --model.hidden_size 16 --model.intermediate_size 24 --model.num_layers 1 --model.num_heads 2 "
    "--sequence_length 16 --batch_size 2 --steps 6 --warmup_steps 2 --eval_every 0 --final_eval_sequences 2 "
    "--checkpoint_every 2"
).split()


@pytest.mark.slow
def test_a_table_of_two_optimizers_and_a_second_call_trains_nothing(tmp_path, capsys, monkeypatch):
    words = ["--output", str(tmp_path), "--optimizers", "apollo-mini,adamw", "--factors", "1,0.3", "--seeds", "0,1"]
    words += ["--jobs", "2", "--", *SMALL]
    assert compare.main(words) == 0
    table = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert (tmp_path / "table.md").read_text().splitlines() == table
    assert len(table) == 4
    for row, name in zip(table[2:], ("apollo-mini", "adamw"), strict=True):
        optimizer, lr, bits, seeds, others, state, _ = (cell.strip() for cell in row.strip("|").split("|"))
        folders = [tmp_path / f"{name}-lr{float(lr):.3g}-seed{seed}" for seed in (0, 1)]
        assert (optimizer, seeds) == (name, "2")
        reached = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1])["bits_per_byte"] for f in folders]
        mean, spread = map(float, re.fullmatch(r"([0-9.]+) ± ([0-9.]+)", bits).groups())
        assert mean == pytest.approx(sum(reached) / 2, abs=1e-3)
        assert spread == pytest.approx(abs(reached[0] - reached[1]) / 2**0.5, abs=1e-3)
        assert float(others.split(":")[1]) >= reached[0] - 1e-3  # the best of the first seed's was taken
        assert (
            int(state.replace(",", ""))
            == json.loads((folders[0] / "finished.json").read_text())["optimizer_state_bytes"]
        )
    # One run was cut off after its checkpoint of step 4: it goes on from there, and nothing else is trained.
    cut = tmp_path / "adamw-lr0.001-seed0"
    before = (cut / "metrics.jsonl").read_text()
    (cut / "finished.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "step_00000006")
    (cut / "metrics.jsonl").write_text("".join(before.splitlines(keepends=True)[:5]))
    started = []
    original = compare.subprocess.run
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: (started.append(a[0]), original(*a, **k))[1])
    assert compare.main(words) == 0
    assert len(started) == 1 and "--resume" in started[0]
    again = [json.loads(row) for row in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again if "loss" in row] == list(range(1, 7))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--optimizers", "apolo"], "unknown optimizer 'apolo'"), (["--jobs", "0"], "--jobs is 0")],
)
def test_wrong_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_ends_the_comparison_with_its_log(tmp_path):
    job = compare.Job("adamw", 1e-3, 0, tmp_path)
    with pytest.raises(RuntimeError, match=r"exit code 2(.|\n)*batch_size"):
        job.run([*SMALL, "--micro_batch_size", "3"])
