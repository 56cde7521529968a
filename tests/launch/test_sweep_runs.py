"""Sweeps that really train: six trials two at a time, killed and continued; a stock launcher; a search that prunes."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from launch import harness

pytestmark = pytest.mark.launch

SMALL = ["trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.load_best_model_at_end=false", "launch=local",
         "dataset.test_size=null", "trainer.per_device_train_batch_size=8"]  # fmt: skip


def words(base: Path, data: Path, runs: Path, *more: str) -> list[str]:
    script = f"launch.script={Path(__file__).with_name('pausing.py')}"
    small = [o for o in SMALL if o.partition("=")[0] not in {m.partition("=")[0] for m in more}]
    return ["train", "-m", *harness.overrides(base, data, runs, *small, script, *more)]


def record(runs: Path) -> tuple[Path, dict]:
    [file] = runs.glob("*/sweep.json")
    return file.parent, json.loads(file.read_text())


def states(runs: Path) -> list[str]:
    try:
        return [t["state"] for t in record(runs)[1]["trials"]]
    except ValueError:  # none is written yet
        return []


@pytest.fixture(scope="module")
def six(base: Path, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of six that was killed with SIGKILL when its first trials had ended, and then continued; its folder."""
    work = tmp_path_factory.mktemp("six")
    argv = words(base, chat, work / "runs", "peft.r=2,8,4,banana,16,6", "hparams_search.parallel=2", "name=six",
                 "hparams_search.progress_seconds=1")  # fmt: skip
    process = harness.start([sys.executable, "-m", "kit", *argv], work)
    harness.wait_for(lambda: states(work / "runs").count("running") == 2, 60, process)
    folder, _ = record(work / "runs")
    assert len(list(folder.glob("*/plan.json"))) == 5  # all are frozen, and the first two have just started
    harness.wait_for(lambda: "done" in states(work / "runs"), 150, process)
    os.kill(process.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert "trial 3 (peft.r=banana): peft.r must be a whole number" in err
    assert "2 running" in err and "trial 000 r=2 running" in err
    plans = {p.parent.name: p.read_bytes() for p in folder.glob("*/plan.json")}
    first = (folder / "000-r-2" / "metrics.jsonl").read_bytes()
    done = harness.kit(*argv, cwd=work)
    assert done.returncode == 4, done.stdout[-2000:] + done.stderr[-3000:]
    assert "continuing" in done.stderr and "trial 000 r=2 running" not in done.stderr
    assert {p.parent.name: p.read_bytes() for p in folder.glob("*/plan.json")} == plans
    assert (folder / "000-r-2" / "metrics.jsonl").read_bytes() == first
    assert "(best)" in done.stdout and "refused" in done.stdout
    harness.assert_nothing_left(folder)
    return folder


def test_six_trials(six: Path):
    """One refused up front, one failing on purpose, the others trained; table and CSV."""
    _, found = record(six.parent)
    by_rank = {t["values"]["peft.r"]: t for t in found["trials"]}
    assert {r: t["state"] for r, t in by_rank.items()} == {
        "2": "done", "8": "failed", "4": "done", "banana": "refused", "16": "done", "6": "done",
    }  # fmt: skip
    assert by_rank["2"]["step"] == 2 and by_rank["2"]["exit_code"] == 0 and by_rank["8"]["exit_code"] == 4
    assert "it fails on purpose" in (six / "001-r-8" / "logs" / "trial.log").read_text()
    rows = list(csv.DictReader((six / "sweep.csv").open()))
    assert len(rows) == 6 and float(rows[0]["loss"]) == harness.rows(six / "000-r-2")[2]
    adapter = json.loads((six / "004-r-16" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 16


def test_the_same_under_the_stock_launcher(six: Path, base: Path, chat: Path, tmp_path: Path):
    """One after the other, each a run of its own below runs/, with the same losses."""
    argv = words(base, chat, tmp_path / "runs", "peft.r=2,8,banana,6", "hydra/launcher=basic", "name=six")
    done = harness.kit(*argv, cwd=tmp_path)
    assert done.returncode == 4, done.stdout[-2000:] + done.stderr[-3000:]
    assert "'banana'" in done.stderr
    found = {json.loads(p.read_text())["peft"]["r"]: p.parent for p in (tmp_path / "runs").glob("*/plan.json")}
    assert {r: harness.status(run)["state"] for r, run in found.items()} == {2: "done", 8: "failed", 6: "done"}
    assert harness.rows(found[2]) == harness.rows(six / "000-r-2")
    assert harness.rows(found[6]) == harness.rows(six / "005-r-6")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_that_take_it_to_other_processes(launcher: str, six: Path, base: Path, chat: Path, tmp_path: Path):
    """They pickle Hydra's task function, not a run; a point is then the same as under the basic one."""
    argv = words(base, chat, tmp_path / "runs", "peft.r=2,banana,6", f"hydra/launcher={launcher}", "name=six")
    done = harness.kit(*argv, cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    found = {json.loads(p.read_text())["peft"]["r"]: p.parent for p in (tmp_path / "runs").glob("*/plan.json")}
    assert {r: harness.status(run)["state"] for r, run in found.items()} == {2: "done", 6: "done"}
    assert harness.rows(found[2]) == harness.rows(six / "000-r-2")


def test_a_search_prunes(base: Path, chat: Path, tmp_path: Path):
    """Four trials, two at a time; the third does not learn and is stopped with a checkpoint."""
    argv = words(base, chat, tmp_path / "runs", "hparams_search=optuna", "hparams_search.n_trials=4", "name=search",
                 "hparams_search.sampler=random", "hparams_search.seed=6", "hparams_search.parallel=2",
                 "hparams_search.pruner.n_startup_trials=1", "trainer.learning_rate=choice(3e-2,1e-9)",
                 "trainer.lr_scheduler_type=constant", "trainer.max_steps=8")  # fmt: skip
    done = harness.kit(*argv, cwd=tmp_path, KIT_TEST_PAUSE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    folder, found = record(tmp_path / "runs")
    assert [t["state"] for t in found["trials"]] == ["done", "done", "pruned", "done"]
    pruned = folder / found["trials"][2]["run"]
    assert found["trials"][2]["step"] < 8 and harness.status(pruned)["state"] == "stopped"
    assert found["best"] in (0, 1, 3)
    harness.assert_nothing_left(folder)
