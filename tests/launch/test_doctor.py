"""`kit doctor RUN` after failures that really happened: a rank killed with -9, a loss that is not finite, a full disk.

What each run left behind is not touched up: logs, error reports and launch.json are those of the launch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import harness

pytestmark = pytest.mark.launch


def train(work: Path, base: Path, data: Path, name: str, *more: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of one process that is expected to fail, and its directory."""
    stock = ("launch=local", "trainer.eval_strategy=no", "dataset.test_size=null")
    quick = ("trainer.load_best_model_at_end=false", f"name={name}")
    done = harness.kit("train", *harness.overrides(base, data, work / name, *stock, *quick, *more), cwd=work)
    assert done.returncode == 4, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / name), done


def diagnosis(run: Path, cwd: Path) -> dict:
    done = harness.kit("doctor", str(run), "--json", cwd=cwd, limit=30)
    found = json.loads(done.stdout)
    assert done.returncode == found["code"] and "Traceback" not in done.stderr
    return found


def test_a_rank_that_is_killed(base, chat, tmp_path, ops_dir):
    """SIGKILL to rank 1 of two; rank 0 falls after it and says so at more length."""
    two = ("deepspeed=zero2", "launch=deepspeed", "launch.num_gpus=2", "trainer.max_steps=100000", "name=killed")
    argv = [sys.executable, "-m", "kit", "train", *harness.overrides(base, chat, tmp_path / "runs", *two)]
    process = harness.start(argv, tmp_path)
    runs = tmp_path / "runs"
    harness.wait_for(lambda: any(runs.glob("*/metrics.jsonl")), harness.LIMIT, process)
    run = harness.the_run(runs)
    living = diagnosis(run, tmp_path)
    assert (living["state"], living["code"]) == ("running", 0) and "alive: process" in living["sentence"]
    os.kill(int((run / "logs" / "rank1.pid").read_text()), signal.SIGKILL)
    done = harness.finish(process)
    assert done.returncode == 4, done.stdout[-3000:] + done.stderr[-3000:]
    found = diagnosis(run, tmp_path)
    assert (found["state"], found["cause"], found["rank"]) == ("failed", "killed", 1)
    assert "SIGKILL" in found["sentence"] and found["where"].endswith("rank1.log")
    ended = json.loads((run / "launch.json").read_text())["ended"]
    # deepspeed ends with the code of whichever rank it looks at first: -9 as a byte, or rank 0's own failure
    assert ended["returncode"] in (247, 4) and "1" in ended["deaths"] and ended["asked"] == 0


def test_a_loss_that_is_not_finite(base, chat, tmp_path):
    run, _ = train(
        tmp_path, base, chat, "notfinite", "trainer.learning_rate=1.0e+20", "trainer.max_grad_norm=0",
        "trainer.logging_steps=2", "trainer.save_strategy=no",
    )  # fmt: skip
    found = diagnosis(run, tmp_path)
    assert (found["cause"], found["rank"]) == ("non_finite", 0)
    step = int(re.search(r"by step (\d+)", found["sentence"])[1])
    assert f"steps {step - 1} to {step} read 16 of the 96 prepared rows" in found["others"][0]
    assert any("<|user|>" in line for line in found["others"][1:])


def test_a_disk_that_is_full(base, chat, tmp_path):
    """The checkpoints outgrow a small tmpfs; torch.save itself does not speak of the disk."""
    small = tmp_path / "full"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        run, _ = train(tmp_path, base, chat, "full", "trainer.save_strategy=steps", "trainer.save_steps=2")
        found = diagnosis(run, tmp_path)
        assert (found["cause"], found["checkpoint"]) == ("disk_full", "checkpoint-4")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_port_that_is_taken(base, chat, tmp_path, ops_dir):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        run, _ = train(tmp_path, base, chat, "port", "deepspeed=zero2", f"launch.master_port={port}")
    found = diagnosis(run, tmp_path)
    assert found["cause"] == "port" and "EADDRINUSE" in found["said"]
    assert found["where"].rpartition(":")[2].isdigit()
