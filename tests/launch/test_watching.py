"""`kit watch` beside a run that really trains: two processes, one of them slow, seen half-way and at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from launch import harness

pytestmark = pytest.mark.launch
HERE = Path(__file__).resolve().parent


def last_row(run: Path, key: str) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if key in line)


def test_beside_a_run_on_two_processes(base, chat, tmp_path):
    runs, go = tmp_path / "runs", tmp_path / "go"
    two = ("launch=torchrun", "launch.num_gpus=2", f"launch.script={HERE / 'slow_rank.py'}", "name=seen")
    argv = [sys.executable, "-m", "kit", "train", *harness.overrides(base, chat, runs, *two)]
    process = harness.start(argv, tmp_path, KIT_TEST_PAUSE_AT="12", KIT_TEST_GO=str(go))
    try:
        logged = lambda: any('"step": 12, ' in f.read_text() for f in runs.glob("*/metrics.jsonl"))  # noqa: E731
        harness.wait_for(logged, harness.LIMIT, process)
        run = harness.the_run(runs)
        before = sorted((f.name, f.stat().st_mtime_ns) for f in run.iterdir())
        done = harness.kit("watch", run.name, "--json", cwd=tmp_path, limit=60)
        assert done.returncode == 0, done.stderr
        found, row = json.loads(done.stdout), last_row(run, "loss")
        assert (found["state"], found["alive"], found["pid"]) == ("running", True, process.pid)
        assert (found["step"], found["max_steps"], found["world_size"], found["restarts"]) == (12, 20, 2, 0)
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "rank_memory_gb", "seconds"):
            assert found[key] == row[key], key
        assert dict(found["losses"]) == harness.rows(run) and found["checkpoint"] == "checkpoint-10"
        assert found["eval_loss"] == last_row(run, "eval_loss")["eval_loss"]
        assert found["seconds_left"] == pytest.approx(8 * found["seconds_per_step"], abs=0.1)
        # rank 1 sleeps 50 ms in each of two passes; the step as a whole takes equally long on both
        slow = found["slowest_rank"]
        assert slow["rank"] == 1 and slow["seconds"] - slow["median_seconds"] > 0.05
        assert slow["forward_seconds"] == row["rank_forward_seconds"][1] >= 0.1
        frame = harness.kit("watch", str(run), "--once", cwd=tmp_path, limit=60)
        assert f"process {process.pid} is alive" in frame.stdout and "\x1b" not in frame.stdout
        assert f"loss           {row['loss']:.4g}\n" in frame.stdout and "12/20 (60 %)" in frame.stdout
        assert sorted((f.name, f.stat().st_mtime_ns) for f in run.iterdir()) == before, "watching wrote something"
        watching = harness.start([sys.executable, "-m", "kit", "watch", str(run), "--interval", "0.5"], tmp_path)
        time.sleep(2)
        go.touch()
        done = harness.finish(process)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        seen = harness.finish(watching, 30)
    finally:
        go.touch()
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    lines = seen.stdout.splitlines()
    assert seen.returncode == 0 and "  done  step 20/20" in lines[-1], seen
    assert len(lines) > 1 and "  running  step " in lines[0], seen  # how far it is by then is the machine's matter
    assert os.path.exists(run / "metrics.json")
