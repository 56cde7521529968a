"""Says how much a disk holds and what it lacks, with the path, the bytes needed and those that are free."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
FIXES = {
    errno.EACCES: "check whose it is and its mode: ls -l", errno.EPERM: "check whose it is and its mode: ls -l",
    errno.EROFS: "choose a place that can be written", errno.ENOENT: "check the path",
}  # fmt: skip
FREE_SOME = "free some space there, or choose another place: runs_dir=FOLDER, --out FOLDER, HF_HOME, TMPDIR"


def format_size(number: float) -> str:
    """Write bytes in decimal units, as the Hub's pages give them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 1000 else f"{number:,.0f} TB"


def free_bytes(path: Path | str) -> tuple[Path, int]:
    """Return the nearest folder of a path that exists, and the bytes that are free on its disk."""
    place = Path(path).expanduser().absolute()
    place = next(p for p in (place, *place.parents) if p.is_dir())
    return place, shutil.disk_usage(place).free


def describe_os_error(error: OSError, path: Path | str | None = None) -> tuple[str, str, str]:
    """Return problem, place and fix for an error of the system; of a full disk also what is free on it."""
    named = str(path or error.filename or error.filename2 or "")
    reason = error.strerror or str(error)
    if error.errno not in FULL:
        fix = FIXES.get(error.errno or 0, "check the path and the disk it is on: df -h")
        return f"the system refused: {reason}", named, fix
    if not named:
        return f"a disk is full: {reason}", "a file or pipe that was being written", f"df -h shows which; {FREE_SOME}"
    place, free = free_bytes(named)
    quota = " of your quota" if error.errno == errno.EDQUOT else ""
    problem = f"the disk is full{quota} ({reason}): {named} cannot be written, {format_size(free)} free"
    return problem, str(place), FREE_SOME
