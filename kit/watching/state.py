"""What a run is doing, read from its directory alone.

Nothing is written and no lock is taken: a run must not notice that it is watched.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from kit.errors import DONE, FAILED, STOPPED, KitError
from kit.storage import manifest, run_directory
from kit.storage.json_files import read_json_or_empty
from kit.watching.metrics import MetricsFollower, finite_number, numbers_per_rank

SWEEP_FILE = "sweep.json"
QUIET_SECONDS = 600.0  # seconds without a word after which a run is called quiet
FIGURES = ("epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "mean_token_accuracy")
PER_RANK = ("rank_load_seconds", "rank_forward_seconds", "rank_memory_gb")


def find_run_or_sweep(name: str) -> tuple[Path, bool]:
    """A run's directory, or that of a sweep (any folder of runs) and True. KitError where there is neither."""
    for place in (Path(name), Path("runs") / name):
        if not (place / run_directory.PLAN).is_file() and (trial_folders(place) or (place / SWEEP_FILE).is_file()):
            return place.absolute(), True
        if (place / run_directory.PLAN).is_file():
            break
    return run_directory.find_run(name), False


def trial_folders(folder: Path) -> list[Path]:
    return sorted(plan.parent.absolute() for plan in folder.glob(f"*/{run_directory.PLAN}"))


def read_run_state(run: Path, metrics: MetricsFollower) -> dict[str, Any]:
    """Everything that is shown, as plain values: None for what is not known. KitError where the run is gone."""
    if not run.is_dir():
        raise KitError(
            f"{run_directory.path_from_here(run)} is gone", fix="it was moved or deleted while it was watched"
        )
    metrics.read()
    status, plan = read_json_or_empty(run / run_directory.STATUS), read_json_or_empty(run / run_directory.PLAN)
    last = metrics.last
    trainer, model = (plan[k] if isinstance(plan.get(k), dict) else {} for k in ("trainer", "model"))
    step, total = last.get("step"), total_steps(metrics, trainer)
    snapshot: dict[str, Any] = {
        "run": run_directory.path_from_here(run),
        "name": run.name,
        "model": model.get("name_or_path"),
        "world_size": metrics.begun.get("world_size") or plan.get("world_size"),
        **run_condition(run, status, metrics),
        "step": step,
        "max_steps": total,
        **{key: finite_number(last.get(key)) for key in FIGURES},
        **{key: numbers_per_rank(last.get(key)) for key in PER_RANK},
        "memory_gb": finite_number(last.get("memory_gb")),
        "slowest_rank": slowest_rank(last),
        "seconds": finite_number(last.get("seconds")),
        "seconds_per_step": metrics.pace(),
        "seconds_left": None,
        **newest_checkpoint_entry(run),
        "restarts": metrics.restarts,
        "losses": [[s, finite_number(v)] for s, v in sorted(metrics.losses.items())],
    }
    snapshot["notes"] += [
        f"{key} is {last[key]} at step {step}" for key in FIGURES if key in last and snapshot[key] is None
    ]
    if metrics.damaged:
        snapshot["notes"].append(
            f"{metrics.damaged} line{'s' * (metrics.damaged > 1)} of metrics.jsonl could not be read"
        )
    pace = snapshot["seconds_per_step"]
    if snapshot["state"] == "running" and pace is not None and step is not None and total is not None:
        snapshot["seconds_left"] = round(max(0, total - step) * pace, 1)
    return snapshot


def total_steps(metrics: MetricsFollower, trainer: dict[str, Any]) -> int | None:
    """max_steps, as training computed it, else as the plan has it, else from the share of epochs that is done."""
    for value in (metrics.begun.get("max_steps"), trainer.get("max_steps")):
        if type(value) is int and value > 0:
            return value
    step, epoch = finite_number(metrics.last.get("step")), finite_number(metrics.last.get("epoch"))
    epochs = finite_number(trainer.get("num_train_epochs"))
    return round(step * epochs / epoch) if step and epoch and epochs else None


def run_condition(run: Path, status: dict[str, Any], metrics: MetricsFollower) -> dict[str, Any]:
    """state (created, running, stopped, failed, done), alive (None: on another machine), pid, problems, notes."""
    recorded = str(status.get("state") or "created")
    problems = status.get("problems") if isinstance(status.get("problems"), list) else []
    facts: dict[str, Any] = {
        "state": recorded, "alive": False, "pid": None, "since": status.get("time"), "host": status.get("host"),
        "exit_code": status.get("exit_code"), "problems": [str(p) for p in problems or []], "notes": [],
    }  # fmt: skip
    if recorded not in ("created", "running"):
        return facts
    if recorded == "created" and (job := last_slurm_job(run)):
        facts["notes"].append(f"submitted as SLURM job {job}: scontrol show job {job} has its state and its log")
    pid = living_lock_holder(run)
    facts["pid"], facts["alive"] = pid, pid is not None
    if pid is not None or recorded == "created":
        pass
    elif status.get("host") not in (None, platform.node()):
        facts["alive"] = None  # its processes cannot be seen from here
    else:
        facts["state"], facts["exit_code"] = "failed", FAILED
        facts["problems"] = [f"it was running since {facts['since']} and no process of it is alive"]
    quiet = time.time() - max(filter(None, (metrics.written, log_mtime(run))), default=math.inf)
    if facts["state"] == "running" and quiet > QUIET_SECONDS:
        facts["notes"].append(
            f"nothing was written for {quiet / 60:.0f} minutes: kit doctor {run_directory.path_from_here(run)}"
        )
    return facts


def last_slurm_job(run: Path) -> str:
    """The last SLURM job that was to train this run, "" for none; only its own controller knows what became of it."""
    jobs = read_json_or_empty(run / "slurm.json").get("jobs")
    rows = [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []
    return next((str(job.get("id")) for job in reversed(rows) if job.get("verb") == "train"), "")


def living_lock_holder(run: Path) -> int | None:
    """The living process that wrote itself into a lock of the run: `kit train`, else rank 0."""
    for name in (run_directory.LOCK, run_directory.RANK_LOCK):
        try:
            text, written = (run / name).read_text().strip(), (run / name).stat().st_mtime
            process = psutil.Process(int(text))
            # A process that began after the lock was written has only the number in common with its holder.
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.create_time() <= written + 1 or has_file_open(process, run / name)
            ):
                return process.pid
        except (OSError, ValueError, OverflowError, psutil.Error):
            continue
    return None


def has_file_open(process: psutil.Process, file: Path) -> bool:
    """The same, where the clock of a file server is behind this machine's."""
    return os.path.realpath(file) in (f.path for f in process.open_files())


def log_mtime(run: Path) -> float | None:
    try:
        return (run / run_directory.LOGS / "rank0.log").stat().st_mtime
    except OSError:
        return None


def slowest_rank(row: dict[str, Any]) -> dict[str, Any] | None:
    """The rank whose own work (reading rows, forward) takes longest, and the middle one's seconds; None for one."""
    load, forward = numbers_per_rank(row.get("rank_load_seconds")), numbers_per_rank(row.get("rank_forward_seconds"))
    if len(load) < 2 or len(load) != len(forward):
        return None
    seconds = [a + b for a, b in zip(load, forward, strict=True)]
    rank = seconds.index(max(seconds))
    return {
        "rank": rank,
        "seconds": round(seconds[rank], 5),
        "median_seconds": round(statistics.median_low(seconds), 5),
        "load_seconds": load[rank],
        "forward_seconds": forward[rank],
    }


def newest_checkpoint_entry(run: Path) -> dict[str, Any]:
    """The newest checkpoint with a manifest, and when it was finished."""
    checkpoints = []
    for file in (run / run_directory.CHECKPOINTS).glob(f"checkpoint-*/{manifest.NAME}"):
        if match := re.fullmatch(manifest.CHECKPOINT_NAME, file.parent.name):
            try:
                checkpoints.append((int(match[1]), file.parent.name, file.stat().st_mtime))
            except OSError:  # rotated away meanwhile
                continue
    if not checkpoints:
        return {"checkpoint": None, "checkpoint_time": None}
    return {"checkpoint": max(checkpoints)[1], "checkpoint_time": round(max(checkpoints)[2], 3)}


def sweep_states(folder: Path, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The states of a sweep's trials, with those that sweep.json names and that have no directory yet, or ever."""
    rows = read_json_or_empty(folder / SWEEP_FILE).get("trials")
    by_name = {row["run"]: row for row in rows or [] if isinstance(row, dict) and isinstance(row.get("run"), str)}
    trials = []
    for trial in states:
        pruned = by_name.get(trial["name"], {}).get("state") == "pruned" and trial["state"] != "running"
        trials.append({**trial, "state": "pruned" if pruned else trial["state"]})
    names = {trial["name"] for trial in states}
    for name, row in by_name.items():
        if name not in names:
            problems = row.get("problems") if isinstance(row.get("problems"), list) else []
            texts = [str(p.get("problem")) if isinstance(p, dict) else str(p) for p in problems or []]
            trials.append({"name": name, "state": str(row.get("state")), "problems": texts})
    return sorted(trials, key=lambda trial: trial["name"])


def all_ended(states: list[dict[str, Any]]) -> bool:
    return all(s["state"] not in ("created", "running", "waiting") for s in states)


def watch_exit_code(states: list[dict[str, Any]]) -> int:
    """0 for what is alive or done, 75 for a stopped run, a failed one's own; of a sweep the worst."""
    codes = {"stopped": STOPPED, "failed": FAILED, "refused": FAILED}
    state_codes = [codes.get(s["state"], DONE) for s in states]
    if len(states) == 1 and state_codes == [FAILED]:
        code = states[0].get("exit_code")
        return code if type(code) is int and code > 0 else FAILED
    return FAILED if FAILED in state_codes else STOPPED if STOPPED in state_codes else DONE
