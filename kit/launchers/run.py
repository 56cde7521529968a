"""Start the ranks of a plan, stay with them, and leave nothing behind.

A single-node `deepspeed` command has no signal handlers of its own: ending it leaves its ranks running (trap T71). So
the ranks are signalled directly, by the process ids that they write down, and whatever still lives at last is killed.

Where each node starts its own ranks, each has a process like this one: it ends its own ranks only, learns from files
in the run directory that another node has failed, and node 0 keeps the status. Ranks that were reached with ssh look
for a file once a second instead of being signalled (remote.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from kit import hardware, manifest, rundir
from kit.config.nodes import over_ssh
from kit.config.schema import RunPlan
from kit.errors import DONE, FAILED, STOPPED, KitError, Problem
from kit.launchers import node, ops, remote
from kit.launchers.command import command, rank_environment
from kit.terminal import say

PEER_SECONDS = 20  # what the ranks here get to notice by themselves that another node has failed
SETTLE_SECONDS = 90  # a shared file system may show node 0's last word late

PR_SET_PDEATHSIG = 1


def launch(plan: RunPlan, resume: str | None = None) -> int:
    """Run a plan whose directory exists; the exit code of the command. Blocks until no process is left."""
    plan = node.placed(plan)
    run, mine, ssh = plan.run_path, node.own_ranks(plan), over_ssh(plan.launch)
    first = mine is None or mine.start == 0
    before = None if first else rundir.status(run)
    name = "" if first else f".node{plan.launch.node_rank}"
    if first:
        for w in plan.warnings:
            say(f"warning: {w['problem']} ({w['where']}); {w['fix']} [{w['rule']}]")
    with rundir.locked(run, rundir.LOCK + name):
        if mine is not None and first:
            node.check_port(plan)
            say(f"node 0 waits for the others: {node.others_command(plan)}")
        if ssh:
            remote.check(plan)
        stop = Stop()
        with stop:
            ops.prepare(
                ops.needed(plan), plan.launch.build_seconds, say, rank_environment(plan), lambda: stop.asked > 0
            )
            if stop.asked:
                return 128 + signal.SIGINT
            forget(run, mine, name)
            argv, env = command(plan, run / rundir.PLAN, resume)
            if ssh:
                env |= remote.environment(plan, env, say)
            record = {"argv": argv, "env": env, "cwd": os.getcwd(), "resume": resume}
            record_file = run / rundir.LAUNCH if first else run / rundir.LOGS / f"launch{name}.json"
            rundir.write_json(record_file, record)
            if first:
                rundir.set_status(run, "running")
            kills, deaths = hardware.oom_kills() or 0, Deaths(run, mine)
            peers = Peers(run, mine) if mine is not None or ssh else None
            # SLURM signals all processes of a step: SIGUSR1 is for us and for the ranks, and would end a launcher.
            process = subprocess.Popen(
                argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            )  # fmt: skip
            try:
                wait(process, run, stop, plan.launch.grace_seconds, deaths, peers, ssh)
            finally:
                if ssh and process.poll() is None:
                    remote.ask_ranks(run, "now")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                kill_all(process, run, mine)
                if ssh and process.returncode:  # whatever still lives on the nodes
                    remote.ask_ranks(run, "now")
                # For `kit doctor RUN`: the launchers' own exit codes do not tell which rank went first, or why.
                killed = (hardware.oom_kills() or 0) - kills
                end = {
                    "returncode": process.returncode,
                    "oom_kills": killed,
                    "deaths": deaths.seen,
                    "asked": stop.asked,
                }
                rundir.write_json(record_file, {**record, "ended": end})
    return outcome(run, process.returncode, name, before)


def newest_checkpoint(run: Path) -> str | None:
    """The name of the checkpoint that an unattended start goes on from, None where there is none; said aloud."""
    newest = manifest.newest_complete(run / rundir.CHECKPOINTS)
    for reason in newest.skipped:
        say(reason)
    if newest.path is None:
        return None
    say(f"resuming from {newest.path.name}")
    return newest.path.name


class Stop:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a flag while ranks run, and gives the handlers back afterwards."""

    def __init__(self) -> None:
        self.asked = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it goes on without us
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1


class Deaths:
    """When each rank was first seen gone, by rank: zombies count, which a launcher only collects a second later."""

    def __init__(self, run: Path, mine: range | None = None) -> None:
        self.run, self.mine = run, mine
        self.seen: dict[str, float] = {}

    def look(self) -> None:
        for rank, pid in written(self.run, self.mine):
            if str(rank) not in self.seen and not lives(pid):
                self.seen[str(rank)] = time.time()


class Peers:
    """Whether ranks of another node have failed, from the errors that they leave in the run directory."""

    def __init__(self, run: Path, mine: range | None) -> None:
        self.run, self.mine = run, mine
        self.before = self.errors()  # of an earlier start, which their own node removes when it starts again
        self.deadline: float | None = None

    def errors(self) -> dict[str, int]:
        found = {}
        for file in error_files(self.run):
            rank = file.name.removeprefix("rank").partition(".")[0]
            if not (self.mine is not None and rank.isdigit() and int(rank) in self.mine):
                with contextlib.suppress(OSError):
                    found[file.name] = file.stat().st_mtime_ns
        return found

    def failed(self) -> bool:
        """True once the ranks here have had their time to notice it."""
        if self.deadline is None and any(self.before.get(name) != at for name, at in self.errors().items()):
            self.deadline = time.monotonic() + PEER_SECONDS
        return self.deadline is not None and time.monotonic() > self.deadline


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def wait(
    process: subprocess.Popen[bytes],
    run: Path,
    stop: Stop,
    grace: float,
    deaths: Deaths,
    peers: Peers | None = None,
    ssh: bool = False,
) -> None:
    """Until the launcher ends. The first request lets the ranks save; the second, or `grace` seconds, ends them."""
    deadline = None
    while process.poll() is None:
        deaths.look()
        if peers and peers.failed():
            say("ranks of another node have failed: ending those that are left")
            return
        if stop.asked and deadline is None:
            deadline = time.monotonic() + grace
            pids = ranks(run, deaths.mine)
            if ssh:
                remote.ask_ranks(run, "save")
            elif not pids:  # nothing trains yet, so there is nothing to save
                return
            say("stopping: the ranks save a checkpoint at the next step (again to end them at once)")
            for pid in pids:
                send(pid, signal.SIGTERM)
        if deadline is not None and (stop.asked > 1 or time.monotonic() > deadline):
            say("ending the ranks without a checkpoint")
            return
        time.sleep(0.1)


def written(run: Path, mine: range | None = None) -> list[tuple[int, int]]:
    """(rank, process id) as ranks of this machine wrote them down; `mine`: those of one node."""
    found = []
    for file in sorted((run / rundir.LOGS).glob("rank*.pid")):
        rank = int(file.stem.removeprefix("rank"))
        with contextlib.suppress(OSError):
            pid, _, host = file.read_text().strip().partition(" ")
            here = not host or host == socket.gethostname()  # where there are several nodes, a number says little
            if pid.isdigit() and here and (mine is None or rank in mine):
                found.append((rank, int(pid)))
    return found


def ranks(run: Path, mine: range | None = None) -> list[int]:
    """Process ids of the living ranks on this machine."""
    return [pid for _, pid in written(run, mine) if psutil.pid_exists(pid)]


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):  # gone, or the number is another person's process now
        return


def forget(run: Path, mine: range | None = None, name: str = "") -> None:
    """Remove what an earlier start left in logs/: pids, errors, notes; on one node of several only its own."""
    logs, numbers = run / rundir.LOGS, "*" if mine is None else None
    for number in [numbers] if numbers else list(map(str, mine or ())):
        for pattern in (f"rank{number}.pid", f"rank{number}.error.json"):
            for file in logs.glob(pattern):
                file.unlink(missing_ok=True)
    if not name:
        (logs / "nonfinite.json").unlink(missing_ok=True)
        remote.forget(run)
    for file in logs.glob("node*.error.json") if mine is None else [logs / f"{node_name(name)}.error.json"]:
        file.unlink(missing_ok=True)


def node_name(name: str) -> str:
    return name.removeprefix(".") or "node0"


def kill_all(process: subprocess.Popen[bytes], run: Path, mine: range | None = None) -> None:
    """End the launcher, everything below it and every rank; ranks under torchrun have sessions of their own."""
    left = ranks(run, mine)
    ops.kill_tree(process.pid)
    for pid in left:
        ops.kill_tree(pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    for file in (run / rundir.LOGS).glob("rank*.pid"):
        if mine is None or int(file.stem.removeprefix("rank")) in mine:
            file.unlink(missing_ok=True)


def outcome(run: Path, returncode: int | None, name: str = "", before: dict[str, Any] | None = None) -> int:
    """The exit code, from what rank 0 wrote down: a launcher's own code says little (deepspeed can end with 0).

    `name`: of a node that is not the first, which waits for the first one's word and leaves the status alone;
    `before`: the status when that node began, which may be an earlier start's.
    """
    state = settled(run, returncode, before) if name else rundir.status(run)
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
    if not name:
        rundir.set_status(run, "failed", exit_code=code, problems=[str(p) for p in problems])
    report = {"code": code, "problems": [vars(p) for p in problems]}  # for the other nodes
    rundir.write_json(run / rundir.LOGS / f"{node_name(name)}.error.json", report)
    raise KitError(problems, code=code)


def settled(run: Path, returncode: int | None, before: dict[str, Any] | None) -> dict[str, Any]:
    """The run's status once node 0 has written how it ended; ranks that failed here need no word of node 0."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (state := rundir.status(run)).get("state") in ("created", "running") or state == before:
        if time.monotonic() > deadline or (returncode and read_errors(run)[0]):
            return {}
        time.sleep(0.5)
    return state


def error_files(run: Path) -> list[Path]:
    return [*(run / rundir.LOGS).glob("rank*.error.json"), *(run / rundir.LOGS).glob("node*.error.json")]


def changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # its own node begins again, and has just removed it
        return 0.0


def read_errors(run: Path) -> tuple[list[Problem], int]:
    """What the ranks wrote before they died, the earliest first, each problem once."""
    files = sorted(error_files(run), key=changed)
    reports = [rundir.read_json(f) for f in files]
    problems = {p["problem"]: Problem(**p) for report in reports for p in report.get("problems", [])}
    return list(problems.values())[:3], next((r["code"] for r in reports if r.get("code")), FAILED)


def stop_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, however it ends; only Linux does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(128 + signal.SIGTERM)
