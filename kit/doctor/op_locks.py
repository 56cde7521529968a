"""Locks of operator builds: whose they are, how old, and which of them nobody will ever release."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kit.doctor.findings import BAD, OK, WARN, Finding
from kit.launchers import ops

# A folder on a shared disk can hold the lock of a build on another machine, which is not visible here.
NETWORK_FILESYSTEMS = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "fuse.sshfs",
    "glusterfs",
    "afs",
}
BUILD_TIMEOUT = 3600.0  # seconds after which no build is still at work there


@dataclass(frozen=True)
class OpLock:
    """A lock file of torch's builder. pid: who holds it here; dead: nobody does, and nobody elsewhere can."""

    path: Path
    user: str
    age: float
    pid: int | None
    dead: bool


def extension_folders(env: Mapping[str, str], home: Path) -> list[Path]:
    """Where operators are compiled: TORCH_EXTENSIONS_DIR, the kit's own folder, torch's default."""
    given = [Path(env["TORCH_EXTENSIONS_DIR"])] if env.get("TORCH_EXTENSIONS_DIR") else []
    return list(dict.fromkeys([*given, ops.extensions_dir(), home / ".cache" / "torch_extensions"]))


def find_locks(places: list[Path], mounts: Path = Path("/proc/mounts")) -> list[OpLock]:
    """Every lock two levels below the folders, as torch (py311_cu130/NAME/lock) and the kit lay them out."""
    locks = []
    for path in sorted({p for place in places for p in (*place.glob("*/lock"), *place.glob("*/*/lock"))}):
        try:
            facts = path.stat()
        except OSError:
            continue
        age, pid = max(0.0, time.time() - facts.st_mtime), lock_holder(path)
        away = filesystem_type(path, mounts) in NETWORK_FILESYSTEMS and age < BUILD_TIMEOUT
        locks.append(OpLock(path, user_name(facts.st_uid), age, pid, pid is None and not away))
    return locks


def lock_holder(lock: Path) -> int | None:
    """A living process that works in the lock's folder, or has the lock file open as torch's builder does."""
    if pid := ops.builder_process(lock.parent):
        return pid
    target = str(lock.resolve())
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) == target for fd in os.scandir(folder)):
                return int(folder.parent.name)
        except OSError:  # ended meanwhile, or another user's
            continue
    return None


def filesystem_type(path: Path, mounts: Path) -> str:
    """The type of the file system that a path is on, "" where it cannot be known."""
    try:
        rows = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    text = str(path.resolve())
    fitting = [(where, kind) for where, kind in rows if (text + "/").startswith(where.rstrip("/") + "/")]
    return max(fitting, key=lambda row: len(row[0]), default=("", ""))[1]


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def check_locks(places: list[Path], mounts: Path = Path("/proc/mounts")) -> list[Finding]:
    findings = []
    for lock in find_locks(places, mounts):
        description = f"{lock.path}, {lock.age:.0f} s old, of user {lock.user}"
        if lock.pid:
            findings.append(
                Finding(WARN, "operator lock", f"process {lock.pid} is compiling: {description}", "wait for it")
            )
        elif lock.dead:
            problem = f"a killed build left it, every run that needs it waits for ever: {description}"
            findings.append(Finding(BAD, "operator lock", problem, "kit doctor --remove-stale-locks"))
        else:
            problem = f"no process here holds it, one on another machine may: {description}"
            findings.append(Finding(WARN, "operator lock", problem, f"if none does: rm {lock.path}"))
    return findings or [Finding(OK, "operator locks", "none")]


def remove_dead_locks(places: list[Path], mounts: Path = Path("/proc/mounts")) -> tuple[list[Path], list[OpLock]]:
    """Remove locks that nobody holds; what was removed, and what was left alone. Each is looked at again first."""
    removed, left = [], []
    for lock in find_locks(places, mounts):
        again = next((x for x in find_locks([lock.path.parent.parent], mounts) if x.path == lock.path), None)
        if again is None:
            continue
        if not again.dead:
            left.append(again)
            continue
        try:
            lock.path.unlink()
            removed.append(lock.path)
        except OSError:
            left.append(again)
    return removed, left
