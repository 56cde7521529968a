"""The run directory: its names, its lock, its status. Every later verb needs only this directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kit.errors import REFUSED, KitError
from kit.schema.run_plan import RunPlan, load_plan
from kit.storage.json_files import atomic_write_json, atomic_write_text, read_json_or_empty
from kit.system.terminal import print_status

PLAN, DS_CONFIG, LAUNCH, STATUS = "plan.json", "ds_config.json", "launch.json", "status.json"
METRICS, METRICS_LOG, SAMPLES, DATA = "metrics.json", "metrics.jsonl", "samples.json", "data.json"
FINGERPRINTS = "fingerprints.json"  # what the run is trained on: kit/training/fingerprints.py
ADAPTER, MODEL, CHECKPOINTS, LOGS = "adapter", "model", "checkpoints", "logs"
LOCK, RANK_LOCK = ".lock", ".lock.rank0"  # of the command that started a run, and of its rank 0
LOCK_PROBE_SECONDS = 0.3  # for as long a lock may only be looked at (`in_use`)


def create_run_directory(plan: RunPlan, fresh: bool = False) -> RunPlan:
    """Make the plan's run directory and write plan.json; the plan comes back with the directory it really has.

    The same plan again: finished -> a suffix; never started -> taken; unfinished -> refused unless `fresh`, which
    takes a suffix too.
    """
    base = Path(plan.run_dir)
    run = base
    for number in range(2, 10_000):
        if not (run / PLAN).exists():
            break
        state = read_status(run).get("state")
        if process_holding_lock(run):
            raise KitError(
                f"{run} is in use by process {process_holding_lock(run)}", fix="wait for it, or change the run"
            )
        same = plan_hash_of(run) == plan.hash
        if same and state == "created" and not fresh:
            break
        if same and state != "done" and not fresh:
            raise KitError(
                f"{run} holds this very run, {'unfinished' if state != 'failed' else 'failed'}",
                where="runs_dir, name",
                fix=f"kit resume {path_from_here(run)}, or the same command with --fresh for a new directory",
            )
        run = base.with_name(f"{base.name}-{number}")
    return make_run_directory(plan.model_copy(update={"run_dir": str(run)}))


def make_run_directory(plan: RunPlan) -> RunPlan:
    """Write a plan into its own directory, made where it is not there; KitError where it cannot be."""
    run = plan.run_path
    try:
        (run / LOGS).mkdir(parents=True, exist_ok=True)
        (run / CHECKPOINTS).mkdir(exist_ok=True)
        os.chmod(run, 0o700)  # resume state is executable pickle: nobody else may plant one
    except OSError as error:
        raise KitError(
            f"{run} cannot be made: {error.strerror}", "runs_dir", "runs_dir=FOLDER that can be written"
        ) from None
    write_plan(plan)
    set_status(run, "created")
    return plan


def plan_hash_of(run: Path) -> str:
    try:
        return load_plan(run).hash
    except KitError:
        return ""


def write_plan(plan: RunPlan) -> None:
    """plan.json, the plain ds_config.json, and Hydra's record of the command line."""
    run = plan.run_path
    atomic_write_text(run / PLAN, plan.to_json())
    update_fingerprints(run, plan=plan.model_dump())  # a copy: an edit of plan.json is noticed at a resume
    if plan.deepspeed:
        atomic_write_json(run / DS_CONFIG, plan.deepspeed)
    (run / ".hydra").mkdir(exist_ok=True)
    atomic_write_json(run / ".hydra" / "overrides.json", plan.overrides)
    atomic_write_json(run / ".hydra" / "config.json", plan.composed)


def update_fingerprints(run: Path, **parts: Any) -> None:
    """Write what a run is trained on; a part that is not named stays as it is."""
    atomic_write_json(run / FINGERPRINTS, {**read_json_or_empty(run / FINGERPRINTS), **parts})


def set_status(run: Path, state: str, **facts: Any) -> None:
    """`created`, `running`, `stopped`, `failed` or `done`, with the exit code once there is one."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    atomic_write_json(run / STATUS, {"state": state, "time": now, "host": platform.node(), **facts})


def set_status_refused(run: Path, error: KitError) -> None:
    """The status of a run that was refused before there were ranks; not where another process has it, and trains."""
    if read_status(run).get("state") != "failed" and process_holding_lock(run) in (None, os.getpid()):
        set_status(run, "failed", exit_code=error.code, problems=[str(p) for p in error.problems])


def read_status(run: Path) -> dict[str, Any]:
    return read_json_or_empty(run / STATUS)


def process_holding_lock(run: Path) -> int | None:
    """The process that holds the run directory's lock, None where it is free. Dead holders hold nothing."""
    for path in run.glob(LOCK + "*"):  # of this command, of other nodes, of rank 0
        with open(path) as f:
            if (
                try_flock(f, fcntl.LOCK_SH) is False
            ):  # NFS gives an exclusive lock only to a file that is open for writing
                text = path.read_text().strip()
                return int(text) if text.isdigit() else 0
    return None


def try_flock(f: IO[str], kind: int) -> bool | None:
    """Whether the lock was free, and is ours now; None on a file system that has no locks."""
    try:
        fcntl.flock(f, kind | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


@contextlib.contextmanager
def lock_run_directory(run: Path, name: str = LOCK) -> Iterator[None]:
    """Hold the run directory while the block runs; KitError where another process does."""
    with open(run / name, "a+") as f:
        deadline = time.monotonic() + LOCK_PROBE_SECONDS
        while (ours := try_flock(f, fcntl.LOCK_EX)) is False and time.monotonic() < deadline:
            time.sleep(0.02)
        if ours is False:
            f.seek(0)
            raise KitError(
                f"{run} is in use by process {f.read().strip()}", fix="wait for it, or start another run", code=REFUSED
            )
        if ours is None and name == LOCK:
            print_status(f"the file system of {run} has no locks: nothing keeps a second process out of it")
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


def find_run(name: str) -> Path:
    """A run directory from what was typed: a path, or the name of one below runs/."""
    for path in (Path(name), Path("runs") / name):
        if (path / PLAN).is_file():
            return path.absolute()
    near = sorted(p.parent.name for p in Path("runs").glob(f"{escape_glob(Path(name).name)}*/{PLAN}"))
    raise KitError(
        f"there is no run {name}", fix=f"one of: {', '.join(near)}" if near else "name a folder made by `kit train`"
    )


def escape_glob(text: str) -> str:
    return re.sub(r"[^\w.-]", "?", text)


def path_from_here(path: Path | str) -> str:
    """A path as one would type it from here."""
    text = os.path.relpath(path)
    return text if not text.startswith("..") else str(path)


def stdout_is_terminal() -> bool:
    return sys.stdout.isatty()
