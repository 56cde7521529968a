"""Start the ranks of a plan, stay with them, and leave nothing behind.

A single-node `deepspeed` command has no signal handlers of its own: ending it leaves its ranks running (trap T71). So
the ranks are signalled directly, by the process ids that they write down, and whatever still lives at last is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from kit import hardware, rundir
from kit.config.schema import RunPlan
from kit.errors import DONE, FAILED, STOPPED, KitError, Problem
from kit.launchers import ops
from kit.launchers.command import command, rank_environment

PR_SET_PDEATHSIG = 1


def launch(plan: RunPlan, resume: str | None = None) -> int:
    """Run a plan whose directory exists; the exit code of the command. Blocks until no process is left."""
    run = plan.run_path
    for w in plan.warnings:
        say(f"warning: {w['problem']} ({w['where']}); {w['fix']} [{w['rule']}]")
    with rundir.locked(run):
        stop = Stop()
        with stop:
            ops.prepare(
                ops.needed(plan), plan.launch.build_seconds, say, rank_environment(plan), lambda: stop.asked > 0
            )
            if stop.asked:
                return 128 + signal.SIGINT
            forget(run)
            argv, env = command(plan, run / rundir.PLAN, resume)
            record = {"argv": argv, "env": env, "cwd": os.getcwd(), "resume": resume}
            rundir.write_json(run / rundir.LAUNCH, record)
            rundir.set_status(run, "running")
            kills, deaths = hardware.oom_kills() or 0, Deaths(run)
            process = subprocess.Popen(
                argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                wait(process, run, stop, plan.launch.grace_seconds, deaths)
            finally:
                kill_all(process, run)
                # For `kit doctor RUN`: the launchers' own exit codes do not tell which rank went first, or why.
                killed = (hardware.oom_kills() or 0) - kills
                end = {
                    "returncode": process.returncode,
                    "oom_kills": killed,
                    "deaths": deaths.seen,
                    "asked": stop.asked,
                }
                rundir.write_json(run / rundir.LAUNCH, {**record, "ended": end})
    return outcome(run, process.returncode)


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag while ranks run, and gives the handlers back afterwards."""

    def __init__(self) -> None:
        self.asked = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1


class Deaths:
    """When each rank was first seen gone, by rank: zombies count, which a launcher only collects a second later."""

    def __init__(self, run: Path) -> None:
        self.logs = run / rundir.LOGS
        self.seen: dict[str, float] = {}

    def look(self) -> None:
        for file in self.logs.glob("rank*.pid"):
            rank = file.stem.removeprefix("rank")
            if rank not in self.seen and (pid := file.read_text().strip()).isdigit() and not lives(int(pid)):
                self.seen[rank] = time.time()


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def wait(process: subprocess.Popen[bytes], run: Path, stop: Stop, grace: float, deaths: Deaths) -> None:
    """Until the launcher ends. The first request lets the ranks save; the second, or `grace` seconds, ends them."""
    deadline = None
    while process.poll() is None:
        deaths.look()
        if stop.asked and deadline is None:
            deadline = time.monotonic() + grace
            pids = ranks(run)
            if not pids:  # nothing trains yet, so there is nothing to save
                return
            say("stopping: the ranks save a checkpoint at the next step (again to end them at once)")
            for pid in pids:
                send(pid, signal.SIGTERM)
        if deadline is not None and (stop.asked > 1 or time.monotonic() > deadline):
            say("ending the ranks without a checkpoint")
            return
        time.sleep(0.1)


def ranks(run: Path) -> list[int]:
    """Process ids of the living ranks, as they wrote them down."""
    pids = []
    for file in sorted((run / rundir.LOGS).glob("rank*.pid")):
        text = file.read_text().strip()
        if text.isdigit() and psutil.pid_exists(int(text)):
            pids.append(int(text))
    return pids


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def forget(run: Path) -> None:
    """Remove what an earlier start left in logs/: pids, errors, notes."""
    for pattern in ("rank*.pid", "rank*.error.json", "nonfinite.json"):
        for file in (run / rundir.LOGS).glob(pattern):
            file.unlink(missing_ok=True)


def kill_all(process: subprocess.Popen[bytes], run: Path) -> None:
    """End the launcher, everything below it and every rank; ranks under torchrun have sessions of their own."""
    left = ranks(run)
    ops.kill_tree(process.pid)
    for pid in left:
        ops.kill_tree(pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    for file in (run / rundir.LOGS).glob("rank*.pid"):
        file.unlink(missing_ok=True)


def outcome(run: Path, returncode: int | None) -> int:
    """The exit code, from what rank 0 wrote down: a launcher's own code says little (deepspeed can end with 0)."""
    state = rundir.status(run)
    if state.get("state") == "done":
        return DONE
    if state.get("state") == "stopped":
        say(f"stopped at step {state.get('step')} with a complete checkpoint: kit resume {rundir.shown(run)}")
        return STOPPED
    problems, code = read_errors(run)
    if not problems:
        log = run / rundir.LOGS / "rank0.log"
        how = f"was killed by signal {-returncode}" if returncode and returncode < 0 else f"ended with {returncode}"
        problems = [Problem(f"training ended before it was done (the launcher {how})", str(log), "read the log")]
    rundir.set_status(run, "failed", exit_code=code, problems=[str(p) for p in problems])
    raise KitError(problems, code=code)


def read_errors(run: Path) -> tuple[list[Problem], int]:
    """What the ranks wrote before they died, the earliest first, each problem once."""
    files = sorted((run / rundir.LOGS).glob("rank*.error.json"), key=lambda f: f.stat().st_mtime)
    reports = [rundir.read_json(f) for f in files]
    problems = {p["problem"]: Problem(**p) for report in reports for p in report.get("problems", [])}
    return list(problems.values())[:3], next((r["code"] for r in reports if r.get("code")), FAILED)


def say(line: str) -> None:
    """A line for the user. A terminal that is gone must not cost the run its checkpoint."""
    with contextlib.suppress(OSError):
        print(f"kit: {line}", file=sys.stderr, flush=True)


def stop_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(128 + signal.SIGTERM)
