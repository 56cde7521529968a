"""A folder that appears whole or not at all: built beside its place, renamed last, swept up after a kill."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from kit.errors import ENVIRONMENT, KitError

OWNER = ".owner"  # the host that a staging folder belongs to


def refuse_target(target: Path, sources: list[Path], overwrite: bool, report: str, where: str = "--out") -> None:
    """KitError where the output exists and may not be replaced, or would swallow what it is made of.

    `report`: the file that marks a folder as made by the same verb; only such a folder, or an empty one, is replaced.
    """
    if any(s.resolve() == target.resolve() or target.resolve() in s.resolve().parents for s in sources):
        raise KitError(f"{target} holds what is read", where=where, fix="choose another folder")
    recover(target)
    if not target.exists():
        return
    replaceable = target.is_dir() and ((target / report).is_file() or not any(target.iterdir()))
    if not overwrite or not replaceable:
        raise KitError(
            f"{target} exists" + ("" if replaceable else f" and was made by something else (no {report})"),
            where=where,
            fix="choose another folder" + (", or use --overwrite" if replaceable else ""),
        )


def check_room(need: int, target: Path) -> None:
    """KitError (3) where the disk cannot hold `need` bytes."""
    parent = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise KitError(
            f"{parent} has {free / 1e9:.1f} GB free, {target.name} needs {need / 1e9:.1f}", code=ENVIRONMENT
        )


def make_staging(target: Path) -> Path:
    """A fresh staging folder beside the target; those of processes that are gone are removed first."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{target.name}.staging-*"):
            if _is_stale(old):
                shutil.rmtree(old, ignore_errors=True)
        staging = target.with_name(f"{target.name}.staging-{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        (staging / OWNER).write_text(socket.gethostname())
    except OSError as error:
        raise KitError(f"{target.parent} cannot be written: {error}", where=str(target), code=ENVIRONMENT) from error
    return staging


@contextlib.contextmanager
def building(target: Path, fsync: bool) -> Iterator[Path]:
    """A staging folder that becomes `target` when the block ends well, flushed before; else nothing is left.

    KitError (3) where the disk fails.
    """
    staging = make_staging(target)
    try:
        yield staging
        if fsync:
            for path in [*staging.rglob("*"), staging]:  # what its writer has flushed already costs nothing
                sync(path)
        publish(staging, target, fsync)
    except OSError as error:
        raise KitError(f"{target} could not be written: {error}", code=ENVIRONMENT) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_stale(staging: Path) -> bool:
    pid = staging.name.rpartition("-")[2]
    owner = staging / OWNER
    if not pid.isdigit() or (owner.is_file() and owner.read_text() != socket.gethostname()):
        return False  # another host's process cannot be asked
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def publish(staging: Path, target: Path, fsync: bool) -> None:
    """Rename the staging folder into place; what it replaces goes only after that."""
    (staging / OWNER).unlink(missing_ok=True)
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(staging, target)
    if fsync:
        sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(target: Path) -> None:
    """Put back what a killed process had moved aside, or remove it where its successor stands."""
    for old in target.parent.glob(f"{target.name}.replaced-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries: without it a rename can outlive the names after a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
