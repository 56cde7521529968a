"""What finished runs measured is kept, and corrects the next forecast of the same kind on the same GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE, REFUSED
from kit.forecast.calibration import FILE, seconds_per_step
from kit.forecast.hosts import parse_host
from kit.forecast.of_plan import forecast_plan
from kit.inspection.model import inspect_model
from kit.storage import run_directory
from kit.system import hardware

WORDS = ("model=llama3_1_8b", "dataset.path=trl-lib/Capybara", "trainer.max_length=4096",
         "trainer.per_device_train_batch_size=2", "trainer.activation_checkpointing=false")  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def finish(folder: Path, more: float, seconds: float, *words: str) -> Path:
    """Leave what a run on an H100 leaves that took `more` times the memory of its forecast."""
    host = parse_host("h100")
    with hardware.assume_gpus(host.gpus):
        plan = api.compose(*WORDS, *words, f"runs_dir={folder}")
    memory = forecast_plan(plan, inspect_model(plan.model, here=False)[0].text)
    assert memory
    gib = memory.peak * more / 2**30
    plan.run_path.mkdir(parents=True)
    run_directory.write_plan(plan)
    figures = {"allocated": gib, "reserved": gib + 1, "on_the_gpu": gib + 2, "gpu": 79.6, "phases": {}}
    metrics = {"device": "NVIDIA H100 80GB HBM3", "memory_gb": figures}
    (plan.run_path / run_directory.METRICS).write_text(json.dumps(metrics))
    rows = [{"step": n, "seconds": 30 + seconds * n, "loss": 1.0} for n in range(1, 8)]
    (plan.run_path / run_directory.METRICS_LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return plan.run_path


def plan_figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    cli.run_verb(["plan", *WORDS, *words, "--json"])
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_a_forecast_learns_from_a_run(tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = plan_figures(capsys, "hardware=h100")
    assert "calibrated" not in before
    runs = [finish(tmp_path / str(n), more, 9.0, f"trainer.seed={n}") for n, more in enumerate((1.1, 1.3, 1.2))]
    assert cli.run_verb(["plan", "--calibrate", *map(str, runs)]) == DONE
    assert "llama, lora" in capsys.readouterr().out and len(json.loads((own_cache / FILE).read_text())) == 3
    after = plan_figures(capsys, "hardware=h100")
    memory = before["memory"]
    assert after["calibrated"]["memory_runs"] == 3 and after["memory"]["forecast"] == memory["needed"]
    assert after["memory"]["needed"] == pytest.approx(1.2 * memory["allocated"] + 2 * 2**30, rel=1e-6)
    assert after["step"]["fastest"] == pytest.approx(9.0) and after["step"]["slowest"] == pytest.approx(9.0 * 1.05)
    cli.run_verb(["plan", "--calibrate", str(runs[0])])  # again: a run counts once
    assert plan_figures(capsys, "hardware=h100")["calibrated"]["memory_runs"] == 3
    for other in ("hardware=a100", "hardware=2xh100 deepspeed=zero2 launch.num_gpus=2", "hardware=h100 peft=none"):
        assert "calibrated" not in plan_figures(capsys, *other.split()), other
    qwen = plan_figures(capsys, "hardware=h100", "model=qwen3_8b")
    assert qwen["calibrated"]["memory_runs"] == 0 and qwen["calibrated"]["time_runs"] == 3
    assert "forecast" not in qwen["memory"]


@pytest.mark.parametrize("left, said", [("plan", "no memory figures"), ("", "there is no plan")])
def test_what_measured_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str, said: str) -> None:
    run = finish(tmp_path, 1.0, 1.0)
    for name in (run_directory.METRICS, *([] if left else [run_directory.PLAN])):
        (run / name).unlink()
    assert cli.run_verb(["plan", "--calibrate", str(run)]) == REFUSED
    assert said in capsys.readouterr().err


def test_seconds_of_a_step(tmp_path: Path) -> None:
    """Between lines that log a loss, however many steps apart; the first steps and an evaluation left out."""
    rows = [(1, 40.0), (2, 42.0), (4, 46.0), (8, 54.0), (12, 90.0), (16, 98.0)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": n, "seconds": s, "loss": 1}) + "\n" for n, s in rows)
                   + json.dumps({"step": 16, "seconds": 99.0, "eval_loss": 1}) + "\n")  # fmt: skip
    assert seconds_per_step(log) == 2.0
    log.write_text("")
    assert seconds_per_step(log) is None
