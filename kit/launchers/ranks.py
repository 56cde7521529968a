"""What ranks leave in a run's logs/ and whoever started them reads: process ids, errors, and so who still lives."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import psutil

from kit.errors import FAILED, Problem
from kit.launchers import ssh
from kit.storage import run_directory
from kit.storage.json_files import read_json_or_empty

PEER_GRACE_SECONDS = 20  # what the ranks here get to notice by themselves that another node has failed


def recorded_pids(run: Path, own_ranks: range | None = None) -> list[tuple[int, int]]:
    """(rank, process id) as ranks of this machine wrote them down; `own_ranks`: those of one node."""
    pids = []
    for file in sorted((run / run_directory.LOGS).glob("rank*.pid")):
        rank = int(file.stem.removeprefix("rank"))
        with contextlib.suppress(OSError):
            pid, _, host = file.read_text().strip().partition(" ")
            # Where there are several nodes, a number says little.
            on_this_host = not host or host == socket.gethostname()
            if pid.isdigit() and on_this_host and (own_ranks is None or rank in own_ranks):
                pids.append((rank, int(pid)))
    return pids


def living_rank_pids(run: Path, own_ranks: range | None = None) -> list[int]:
    """Process ids of the living ranks on this machine."""
    return [pid for _, pid in recorded_pids(run, own_ranks) if psutil.pid_exists(pid)]


def send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):  # gone, or the number is another person's process now
        return


def remove_rank_files(run: Path, own_ranks: range | None = None, name: str = "") -> None:
    """Remove what an earlier start left in logs/: pids, errors, notes; on one node of several only its own."""
    logs, numbers = run / run_directory.LOGS, "*" if own_ranks is None else None
    for number in [numbers] if numbers else list(map(str, own_ranks or ())):
        for pattern in (f"rank{number}.pid", f"rank{number}.error.json", f"rank{number}.oom.json"):
            for file in logs.glob(pattern):
                file.unlink(missing_ok=True)
    if not name:
        (logs / "nonfinite.json").unlink(missing_ok=True)
        ssh.clear_stop_request(run)
    for file in logs.glob("node*.error.json") if own_ranks is None else [logs / f"{node_file_name(name)}.error.json"]:
        file.unlink(missing_ok=True)


def node_file_name(name: str) -> str:
    return name.removeprefix(".") or "node0"


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


class RankDeathTimes:
    """When each rank was first seen gone, by rank: zombies count, which a launcher only collects a second later."""

    def __init__(self, run: Path, own_ranks: range | None = None) -> None:
        self.run, self.own_ranks = run, own_ranks
        self.times: dict[str, float] = {}

    def update(self) -> None:
        for rank, pid in recorded_pids(self.run, self.own_ranks):
            if str(rank) not in self.times and not is_alive(pid):
                self.times[str(rank)] = time.time()


class PeerFailures:
    """Whether ranks of another node have failed, from the errors that they leave in the run directory."""

    def __init__(self, run: Path, own_ranks: range | None) -> None:
        self.run, self.own_ranks = run, own_ranks
        self.errors_before = self.errors()  # of an earlier start, which their own node removes when it starts again
        self.deadline: float | None = None

    def errors(self) -> dict[str, int]:
        modified = {}
        for file in error_files(self.run):
            rank = file.name.removeprefix("rank").partition(".")[0]
            if not (self.own_ranks is not None and rank.isdigit() and int(rank) in self.own_ranks):
                with contextlib.suppress(OSError):
                    modified[file.name] = file.stat().st_mtime_ns
        return modified

    def failed(self) -> bool:
        """True once the ranks here have had their time to notice it."""
        if self.deadline is None and any(
            self.errors_before.get(name) != mtime for name, mtime in self.errors().items()
        ):
            self.deadline = time.monotonic() + PEER_GRACE_SECONDS
        return self.deadline is not None and time.monotonic() > self.deadline


def out_of_memory(run: Path) -> bool:
    """Whether a rank of this start met an "out of memory" in the trial step (kit/training/rehearsal.py)."""
    return any((run / run_directory.LOGS).glob("rank*.oom.json"))


def error_files(run: Path) -> list[Path]:
    return [*(run / run_directory.LOGS).glob("rank*.error.json"), *(run / run_directory.LOGS).glob("node*.error.json")]


def modification_time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # its own node begins again, and has just removed it
        return 0.0


def read_rank_errors(run: Path) -> tuple[list[Problem], int]:
    """What the ranks wrote before they died, the earliest first, each problem once."""
    files = sorted(error_files(run), key=modification_time)
    reports = [read_json_or_empty(f) for f in files]
    problems = {p["problem"]: Problem(**p) for report in reports for p in report.get("problems", [])}
    return list(problems.values())[:3], next((r["code"] for r in reports if r.get("code")), FAILED)
