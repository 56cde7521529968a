"""The trials of a sweep while they run: what each is, on which devices, how it ended. A trial is a plan path."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kit.errors import DONE, FAILED, STOPPED
from kit.launchers import ops
from kit.launchers.ranks import living_rank_pids, send_signal
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory
from kit.sweeps import warm_pool
from kit.sweeps.warm_pool import WarmWorker
from kit.system import hardware
from kit.system.terminal import print_status

TRIAL_LOG = "trial.log"
FINAL_STATES = ("done", "failed", "pruned", "refused")  # states after which nothing is missing in this sweep


@dataclass
class MetricsLog:
    """The rows of a run's metrics.jsonl, read as they come."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    offset: int = 0

    def read(self) -> list[dict[str, Any]]:
        """The rows that came since the last look; a line that is half-written waits."""
        try:
            with open(self.path, "rb") as f:
                f.seek(self.offset)
                new = f.read()
        except OSError:
            return []
        complete = new[: new.rfind(b"\n") + 1]
        self.offset += len(complete)
        rows = []
        for line in complete.splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
        self.rows += rows
        return rows

    def last(self, key: str) -> Any:
        return next((v for row in reversed(self.rows) if isinstance(v := row.get(key), int | float)), None)


@dataclass
class Trial:
    """One point of a sweep and what became of it. States: waiting, running, done, failed, stopped, pruned, refused."""

    number: int
    run: Path
    values: dict[str, Any]
    state: str = "waiting"
    problems: list[dict[str, str]] = field(default_factory=list)
    code: int | None = None
    seconds: float = 0.0  # over all starts
    plan: RunPlan | None = None
    curve: MetricsLog = field(default_factory=lambda: MetricsLog(Path()))
    process: subprocess.Popen[bytes] | None = None
    devices: list[str] = field(default_factory=list)
    started: float = 0.0
    pruning: bool = False
    worker: WarmWorker | None = None  # the warm process that has it
    cold: bool = False  # a warm process failed with it: it is not given to another
    stop_requested: float | None = None  # when it was told to stop

    def __post_init__(self) -> None:
        self.curve = MetricsLog(self.run / run_directory.METRICS_LOG)

    def label(self) -> str:
        return " ".join(
            f"{short}={format_value(self.values[key])}" for key, short in short_names(list(self.values)).items()
        )


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_names(keys: list[str]) -> dict[str, str]:
    """Dotted key to its last part, or to the whole where two end alike."""
    tails = [key.rpartition(".")[2] for key in keys]
    return {key: tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)}


class TrialPool:
    """The trials that run now, at most `slots`, each with GPUs of its own. `devices`: None where there are no GPUs.

    With `warm`, a trial goes to an idle worker of its key, or to a new one in the place of an idle one.
    """

    def __init__(self, devices: list[str] | None, slots: int, warm: bool = False) -> None:
        self.free, self.slots, self.warm = devices, slots, warm
        self.running: list[Trial] = []
        self.idle: list[WarmWorker] = []
        self.ending = False
        self.explained: set[str] = set()  # why trials start cold in spite of `warm`

    def room_for(self, plan: RunPlan) -> bool:
        free = None if self.free is None else len(self.free) + sum(len(w.devices) for w in self.idle)
        enough = plan.trainer["use_cpu"] or free is None or free >= plan.world_size
        return enough and len(self.running) < self.slots

    def key(self, trial: Trial) -> str | None:
        """Which workers may have the trial; None: it gets a process of its own."""
        assert trial.plan is not None
        return (
            warm_pool.sharing_key(trial.plan)
            if self.warm and not trial.cold and not warm_pool.reason_to_start_cold(trial.plan)
            else None
        )

    def waits_for(self, trial: Trial) -> bool:
        """Whether an idle worker could have it at once."""
        return any(w.key == self.key(trial) for w in self.idle)

    def start(self, trial: Trial) -> None:
        """Start a trial in a session of its own, or in a living worker; its output in logs/trial.log."""
        assert trial.plan is not None
        key = self.key(trial)
        if (
            self.warm
            and not key
            and (reason := warm_pool.reason_to_start_cold(trial.plan))
            and reason not in self.explained
        ):
            self.explained.add(reason)
            print_status(
                f"trial {trial.number:03d} {trial.label()} starts cold, and so do others for this reason: {reason}"
            )
        worker = next((w for w in self.idle if w.key == key), None)
        if worker:
            self.idle.remove(worker)
        else:
            worker = self.new_process(trial, key)
        if worker:
            trial.worker, trial.process, trial.devices = worker, worker.process, worker.devices
            worker.assign(trial.run / run_directory.PLAN)
        trial.state, trial.started, trial.problems, trial.code = "running", time.monotonic(), [], None
        trial.stop_requested = None
        self.running.append(trial)

    def new_process(self, trial: Trial, key: str | None) -> WarmWorker | None:
        """A process for the trial: a worker where there is a key."""
        plan, env = trial.plan, dict(os.environ)
        assert plan is not None
        env.pop("HYDRA_FULL_ERROR", None)
        needed = 0 if plan.trainer["use_cpu"] or self.free is None else plan.world_size
        while self.idle and (
            len(self.running) + len(self.idle) >= self.slots or (needed and len(self.free or []) < needed)
        ):
            self.end_worker(self.idle.pop(0))
        if plan.trainer["use_cpu"]:
            threads = max(1, hardware.count_cpu_cores() // (self.slots * plan.world_size))
            env.setdefault("OMP_NUM_THREADS", str(threads))
        elif self.free is not None:
            trial.devices, self.free = self.free[:needed], self.free[needed:]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(trial.devices)
        (trial.run / run_directory.LOGS).mkdir(exist_ok=True)
        with open(trial.run / run_directory.LOGS / TRIAL_LOG, "ab") as log:
            if key:
                return WarmWorker(key, trial.devices, plan, env, log)
            trial.process = subprocess.Popen(
                trial_command(trial.run / run_directory.PLAN),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        return None

    def end_worker(self, worker: WarmWorker) -> None:
        worker.end()
        if self.free is not None:
            self.free = self.free + worker.devices

    def ended(self) -> list[Trial]:
        """The trials that ended since the last look, with state, exit code, problems and seconds."""
        ended_trials = []
        for trial in list(self.running):
            assert trial.process is not None
            worker, code, reason = trial.worker, trial.process.poll(), ""
            if worker:
                result = worker.poll_result()
                if result is None and warm_pool.overdue(trial.stop_requested, trial.plan):
                    worker.kill()
                code, reason = (None, "") if result is None else (result["code"], result["why"])
            if code is None:
                continue
            self.running.remove(trial)
            if worker and not reason:
                self.idle.append(worker)
            elif worker:
                self.end_worker(worker)
            elif self.free is not None:
                self.free = self.free + trial.devices
            trial.devices, trial.worker = [], None
            finish_trial(trial, code)
            if worker and trial.state == "failed" and trial.code == FAILED and not (trial.pruning or self.ending):
                cause = trial.problems[0]["problem"].splitlines()[0] if trial.problems else reason
                print_status(
                    f"trial {trial.number:03d} {trial.label()} failed in a warm worker, which is ended: {cause}"
                )
                print_status(f"trial {trial.number:03d} starts cold")
                trial.cold = True
                self.start(trial)
                continue
            if worker and reason and trial.state in ("done", "stopped", "pruned"):
                print_status(f"the worker of trial {trial.number:03d} takes no other trial: {reason}")
            ended_trials.append(trial)
        return ended_trials

    def stop_all(self) -> None:
        """Tell every trial to stop: once with a checkpoint, twice at once."""
        self.ending = True
        for trial in self.running:
            stop_trial(trial)

    def kill(self) -> None:
        """End whatever still lives, ranks first found by what they wrote down."""
        self.ending = True
        for trial in self.running:
            pids = living_ranks_of(trial.run)
            if trial.process:
                ops.kill_tree(trial.process.pid)
            for pid in pids:
                ops.kill_tree(pid)
        while self.idle:
            self.end_worker(self.idle.pop())


def trial_command(plan: Path) -> list[str]:
    """What is typed to start a trial."""
    return [sys.executable, "-m", "kit.sweeps.trial", str(plan), str(os.getpid())]


def stop_trial(trial: Trial) -> None:
    if trial.process and trial.process.poll() is None:
        again, trial.stop_requested = trial.stop_requested is not None, trial.stop_requested or time.monotonic()
        if trial.worker and again:  # a cold trial ends its rank itself
            trial.worker.kill()
        else:
            send_signal(trial.process.pid, signal.SIGTERM)


def finish_trial(trial: Trial, code: int) -> None:
    """State, exit code and problems of a trial that is over, from what it wrote down; `code`: its process's."""
    for pid in living_ranks_of(trial.run):  # of a trial that was killed: its devices are another trial's now
        ops.kill_tree(pid)
    trial.seconds = round(trial.seconds + time.monotonic() - trial.started, 1)
    status = run_directory.read_status(trial.run)
    written = status.get("state")
    trial.process = None
    trial.curve.read()
    if written == "done":
        trial.state, trial.code = "done", DONE
    elif trial.pruning:
        trial.state, trial.code = "pruned", STOPPED
    elif written == "failed":
        trial.state, trial.code = "failed", int(status.get("exit_code") or FAILED)
        trial.problems = [{"problem": text} for text in status.get("problems", [])]
    elif written == "stopped" or code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM):
        trial.state, trial.code = "stopped", STOPPED
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        was_asked = trial.stop_requested is not None  # then whoever asked did not wait for the checkpoint
        trial.state, trial.code = ("stopped", STOPPED) if was_asked else ("failed", FAILED)
        trial.problems = [{"problem": f"the trial {how}", "where": str(trial.run / run_directory.LOGS / TRIAL_LOG)}]


def refresh_state(trial: Trial) -> None:
    """The state of a trial of an earlier sweep process, before it is decided whether something is missing."""
    trial.curve.read()
    if run_directory.read_status(trial.run).get("state") == "done":
        trial.state, trial.code = "done", DONE
    elif trial.state not in ("refused", "pruned"):
        trial.state = "waiting"


def is_held(trial: Trial) -> bool:
    """Whether processes of an earlier sweep still hold the trial; they stop by themselves, with a checkpoint."""
    return run_directory.process_holding_lock(trial.run) is not None or bool(living_ranks_of(trial.run))


def living_ranks_of(run: Path) -> list[int]:
    """Process ids of ranks that live; a number that has become another process's does not count."""
    pids = []
    for pid in living_rank_pids(run):
        with contextlib.suppress(psutil.Error):
            if any(str(run) in part for part in psutil.Process(pid).cmdline()):
                pids.append(pid)
    return pids
