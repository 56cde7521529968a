"""tests/benchmarks/gpu.py end to end on a tiny base, and what its tables say of rows that are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import arms  # noqa: E402
import gpu  # noqa: E402
import speed_table  # noqa: E402


@pytest.mark.launch
def test_the_kit_beside_trl(tmp_path: Path):
    """Both arms at the same rows have the same losses; a later call runs neither again."""
    out = tmp_path / "speed.json"
    argv = [sys.executable, str(BENCHMARKS / "gpu.py"), "--cpu", "--shape", "tiny", "--works", "full"]
    argv += ["--arms", "kit,trl", "--steps", "3", "--series", "1", "--out", str(out), "--work-dir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(out.read_text())
    kit, trl = (written["rows"][f"full tiny {arm} 1"] for arm in ("kit", "trl"))
    assert len(kit["losses"]) == 3 and kit["losses"][0] != kit["losses"][1]
    assert kit["losses"] == pytest.approx(trl["losses"], abs=2e-5)  # five digits; TRL's own learning rate: 1e-4 apart
    assert kit["useful_tokens"] == trl["useful_tokens"] == [256] * 3
    assert kit["forecast_gb"] and kit["chosen"]["per_device_train_batch_size"] == 2
    assert written["machine"]["torch"] and written["machine"]["gpus"] == []
    assert [line.split()[:3] for line in done.stdout.splitlines()][-2:] == [
        ["full", "tiny", a] for a in ("trl", "kit")
    ]
    again = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=200)
    assert json.loads(out.read_text())["rows"] == written["rows"] and "full tiny kit 1" not in again.stdout


def row(rate: float, losses: list[float], **more):
    return {"useful_tokens_per_second": rate, "first_step_after_seconds": 20.0, "losses": losses, **more}


def test_the_summary_of_known_rows():
    rows = {
        "full 8b limit 1": {"useful_tokens_per_second": 200.0},
        "full 8b trl 1": row(50.0, [2.0, 1.0], peak_gb=10.0),
        "full 8b trl 2": row(70.0, [2.0, 1.0], peak_gb=12.0),
        "full 8b kit 1": row(120.0, [2.0, 1.25], peak_gb=30.0, forecast_gb=33.0),
        "full 8b expert 1": {"out_of_memory": True},
        "documents 8b trl 1": row(10.0, [3.0]),
        "documents 8b kit 1": row(50.0, [5.0]),
        "learning 0b6 kit 1": row(1.0, [3.0, 2.5]),
        "learning 0b6 trl 1": row(1.0, [3.0, 2.0]),
        "learning 0b6 kit 2": row(1.0, [3.0, 2.0]),
        "learning 0b6 trl 2": row(1.0, [3.0, 1.0]),
        "sweep 8b auto 1": row(90.0, [2.0], peak_gb=10.0, forecast_gb=11.0, options_that_ran_out_of_memory=0),
        "sweep 8b off/1 1": row(100.0, [2.0], peak_gb=20.0, forecast_gb=19.0),
        "sweep 8b off/2 1": {"out_of_memory": True},
    }
    found = speed_table.summarize(rows)
    kit = found["speed"]["full 8b"]["kit"]
    assert (kit["of_limit"], kit["of_trl"], kit["losses_apart"]) == (0.6, 2.0, 0.25)
    assert found["speed"]["full 8b"]["trl"]["useful_tokens_per_second"] == 60.0
    assert found["speed"]["full 8b"]["trl"]["spread"] == pytest.approx(20 / 60, abs=1e-4)
    assert "losses_apart" not in found["speed"]["documents 8b"]["kit"]  # padded and packed steps hold other rows
    learned = found["learning"]["0b6"]
    assert learned["paired_gap"] == 0.375 and learned["largest_apart"] == 1.0 and learned["seeds"] == 2
    assert learned["between_seeds"]["trl"] == pytest.approx(0.35355, abs=1e-4)
    swept = found["sweep"]["8b"]
    assert swept["auto_of_best"] == 0.9 and swept["out_of_memory"] == ["off/2"] and swept["options"] == 2
    assert swept["forecast_error"] == {"least": -0.05, "most": 0.1}
    printed = speed_table.table(found).splitlines()
    assert [line.split()[2] for line in printed[1:5]] == ["limit", "trl", "kit", "expert"]
    assert printed[4].endswith("out of memory") and "60%" in printed[3] and "2.00" in printed[3]
    assert printed[-1].startswith("sweep, 8b: 2 options, 1 out of memory; best off/1")


def test_only_timed_steps_count():
    """The first three steps, and those after a checkpoint, are left out; padding is no useful token."""
    ends = [10.0, 20.0, 30.0, 31.0, 36.0, 37.0]
    raw = {"step_ends": ends, "tokens_per_step": 100, "useful_tokens": [9, 9, 9, 40, 50, 60], "save_steps": [4],
           "peak_gb": None, "peak_reserved_gb": None, "checkpoint_seconds": [], "losses": [1.0],
           "begun": 7.0, "training_began": 8.5}  # fmt: skip
    found = arms.figures(raw, 5.0, 40.0, Path("nowhere"))
    assert found["useful_tokens_per_second"] == 50.0 and found["median_step_seconds"] == 1.0
    assert found["tokens_per_second"] == 100.0 and found["first_step_after_seconds"] == 5.0
    assert found["start_seconds"] == {"imported": 2.0, "base loaded": 0.0, "training began": 3.5}


def test_padding_is_not_counted():
    import torch
    from clock import Clock

    clock, model = Clock(), torch.nn.Linear(4, 4)
    model.forward = lambda input_ids, attention_mask=None: input_ids
    clock.on_train_begin(None, None, None, model=model)
    model(input_ids=torch.ones(2, 4))  # before the first step: a trial, not training
    clock.on_step_begin(None, None, None)
    model(input_ids=torch.ones(2, 4), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    model(input_ids=torch.ones(1, 6))  # a second micro-step, packed
    model.eval()(input_ids=torch.ones(1, 6))
    assert [sum(int(n) for n in step) for step in clock.useful] == [10]


def test_what_is_planned(capsys: pytest.CaptureFixture[str]):
    def keys(gpus: int, **changes) -> list[str]:
        known = dict(works=["full", "zero2"], shapes=None, arms=None, series=2, seeds=3, tiny=False, cpu=False)
        return [job.key for job in gpu.planned(types.SimpleNamespace(**(known | changes)), gpus)]  # type: ignore[arg-type]

    one = keys(1)
    assert one[:5] == [f"full 8b {arm} 1" for arm in ("limit", "trl", "expert", "expert_bf16", "kit")]
    assert one[5:10] == [f"full 8b {arm} 2" for arm in ("kit", "expert_bf16", "expert", "trl", "limit")]
    assert "full gpt2xl kit 1" in one and "full gpt2xl expert 1" not in one and not any("zero2" in k for k in one)
    assert "zero2 needs 2 GPUs, 1 here" in capsys.readouterr().out
    assert "zero2 8b kit 2" in keys(2)
    swept = keys(1, works=["sweep"], shapes=["8b"], arms=["typed"])
    assert swept[0] == "sweep 8b off/1 1" and "sweep 8b all/4 1" in swept and "sweep 8b auto 1" not in swept
    assert len(swept) == 3 * len(gpu.LEVELS)
    assert gpu.Job("full", "gpt2xl", "kit", 1).rows == 8 and gpu.Job("full", "gemma9b", "kit", 1).length == 4096
