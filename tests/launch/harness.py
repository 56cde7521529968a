"""Starting real runs from tests: the command line in a child process, with limits, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds for one launch

# 20 optimizer steps of 8 rows of unequal length; clipping is active; evaluation, saving and the best model take part.
TRAINER = {
    "max_steps": 20, "logging_steps": 1, "learning_rate": 1.0e-2, "max_grad_norm": 0.5, "max_length": 64,
    "assistant_only_loss": "true", "gradient_checkpointing": "false", "eval_strategy": "steps", "eval_steps": 10,
    "save_steps": 10, "load_best_model_at_end": "true", "use_cpu": "true", "seed": 7,
}  # fmt: skip


def overrides(base: Path, data: Path, runs: Path, *more: str) -> list[str]:
    """One description for every engine: the same 8 rows per step however many processes share them."""
    stock = [
        f"model.name_or_path={base}", f"dataset.path={data}", "dataset.test_size=16", f"runs_dir={runs}",
        "global_batch_size=8", "trainer.per_device_train_batch_size=2", "trainer.bf16=false", "trainer.fp16=false",
        "peft.r=4", "peft.lora_alpha=8", *(f"trainer.{k}={v}" for k, v in TRAINER.items()),
    ]  # fmt: skip
    given = {o.partition("=")[0] for o in more}
    if "peft=none" in more:
        stock = [o for o in stock if not o.startswith("peft.")]
    return [o for o in stock if o.partition("=")[0] not in given] + list(more)


def environment(**more: str) -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    if (
        "KIT_TEST_CONNECTIONS" in env
    ):  # the kit's own switches are to be seen, not the suite's; TRL reports not under CI
        for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_ENDPOINT", "CI"):
            if name not in more:
                env.pop(name, None)
    return env


def watched(file: Path) -> dict[str, str]:
    """Environment in which every attempt to reach another machine is noted in `file`; the Hub may be asked in it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "connections")])
    return {"PYTHONPATH": path, "KIT_TEST_CONNECTIONS": str(file), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


def kit(*args: str, cwd: Path, limit: float = LIMIT, **env: str) -> subprocess.CompletedProcess[str]:
    """The command `kit`, to its end; a run that hangs is killed with all of its children."""
    return finish(start([sys.executable, "-m", "kit", *args], cwd, **env), limit)


def start(argv: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv, cwd=cwd, env=environment(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
        out, err = process.communicate()
        raise AssertionError(f"took longer than {limit} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def the_run(runs: Path) -> Path:
    """The only run directory below `runs`."""
    found = sorted(p.parent for p in runs.glob("*/plan.json"))
    assert len(found) == 1, found
    return found[0]


def rows(run: Path, key: str = "loss") -> dict[int, float]:
    """Step to value from metrics.jsonl; a step that was trained twice counts once, as it ended up."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def processes_of(run: Path) -> list[str]:
    """Command lines of living processes that mention the run directory: there must be none after a run."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if str(run) in line and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except psutil.Error:
            continue
    return found


def assert_nothing_left(run: Path, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while (left := processes_of(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left
    record = run / "launch.json"
    argv = json.loads(record.read_text())["argv"] if record.exists() else []
    if "--master_port" in argv:  # memory that no process holds
        assert not list(Path("/dev/shm").glob(f"*_{argv[argv.index('--master_port') + 1]}_*"))


def wait_for(condition, seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)
