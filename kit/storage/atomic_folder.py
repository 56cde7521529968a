"""A folder that appears whole or not at all: built beside its place, renamed last, swept up after a kill."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from kit.errors import ENVIRONMENT, KitError
from kit.storage.disk import FREE_SOME, describe_os_error, format_size, free_bytes

# Names of unfinished work, all beside the folder that they belong to. None matches "checkpoint-*".
STAGING, REPLACED, TRASH = ".staging-", ".replaced-", ".trash-"
OWNER = ".owner"  # in the staging folder of a command: the host whose process writes it


def staging_path(target: str | Path) -> Path:
    """Return where all ranks of a run build `target`: beside it, so that the rename stays on one file system."""
    target = Path(target)
    return target.parent / (STAGING + target.name)


@contextlib.contextmanager
def atomic_folder(
    target: Path, staging: Path, fsync: bool = True, move: Callable[[Path, Path], None] | None = None
) -> Iterator[Path]:
    """Yield the empty folder `staging`, which becomes `target` when the block ends well; else nothing of it is left.

    What stands at `target` is replaced, or `move(staging, target)` is called instead. With `fsync` everything is
    flushed before the rename, and the rename after it. OSError where the disk fails.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if fsync:
            for path in [*staging.rglob("*"), staging]:  # what its writer has flushed already costs nothing
                fsync_path(path)
        if move:
            move(staging, target)
        else:
            replace_folder(staging, target, fsync)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def output_folder(target: Path, fsync: bool, move: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Yield the `atomic_folder` of a command's output, after removing those of processes that are gone.

    Its name holds the process id: two commands with one target do not meet before the rename. KitError (3) where the
    disk fails.
    """
    with contextlib.ExitStack() as stack:
        try:
            for old in target.parent.glob(f"{target.name}{STAGING}*"):
                if _is_stale(old):
                    shutil.rmtree(old, ignore_errors=True)
            name = f"{target.name}{STAGING}{os.getpid()}"
            staging = stack.enter_context(atomic_folder(target, target.with_name(name), fsync, move))
            (staging / OWNER).write_text(socket.gethostname())
        except OSError as error:
            problem, where, fix = describe_os_error(error, target)
            raise KitError(f"{target.parent} cannot be written: {problem}", where, fix, code=ENVIRONMENT) from error
        try:
            yield staging
            (staging / OWNER).unlink(missing_ok=True)
            stack.close()
        except OSError as error:
            problem, where, fix = describe_os_error(error, error.filename or target)
            raise KitError(f"{target} could not be written: {problem}", where, fix, code=ENVIRONMENT) from error


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


def replace_folder(staging: Path, target: Path, fsync: bool = True) -> None:
    """Rename `staging` to `target`; what it replaces goes only after that, and comes back where the rename fails.

    The old folder is away only between two renames; a kill in that moment leaves it under another name, and `recover`
    or `remove_leftovers` brings it back.
    """
    replaced = staging.with_name(staging.name.replace(STAGING, REPLACED))
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    try:
        os.rename(staging, target)
    except OSError:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    if fsync:
        fsync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover_replaced(target: Path) -> None:
    """Put back what a killed command had moved aside, or remove it where its successor stands."""
    for replaced in target.parent.glob(f"{target.name}{REPLACED}*"):
        _restore_replaced(replaced, target)


def remove_leftovers(folder: str | Path) -> list[str]:
    """Clear what killed saves left in `folder`, bring back a folder that was being replaced; return their names."""
    prefixes = (STAGING, REPLACED, TRASH)
    leftovers = [path for path in Path(folder).glob(".*") if path.is_dir() and path.name.startswith(prefixes)]
    for path in leftovers:
        if path.name.startswith(REPLACED):
            _restore_replaced(path, path.parent / path.name.removeprefix(REPLACED))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in leftovers)


def _restore_replaced(replaced: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(replaced, target)


def discard_folder(folder: str | Path) -> None:
    """Delete a folder; a kill half-way leaves nothing that could be taken for a checkpoint."""
    folder = Path(folder)
    trash = folder.parent / (TRASH + folder.name)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries: without it a rename can outlive the names after a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_output_folder(target: Path, sources: list[Path], overwrite: bool, report: str, where: str = "--out") -> None:
    """Refuse an output folder that exists and may not be replaced, or that holds what it would be made of.

    `report`: the file that marks a folder as made by the same verb; only such a folder, or an empty one, is replaced.
    """
    if any(s.resolve() == target.resolve() or target.resolve() in s.resolve().parents for s in sources):
        raise KitError(f"{target} holds what is read", where=where, fix="choose another folder")
    recover_replaced(target)
    if not target.exists():
        return
    replaceable = target.is_dir() and ((target / report).is_file() or not any(target.iterdir()))
    if not overwrite or not replaceable:
        raise KitError(
            f"{target} exists" + ("" if replaceable else f" and was made by something else (no {report})"),
            where=where,
            fix="choose another folder" + (", or use --overwrite" if replaceable else ""),
        )


def check_free_space(need: int, target: Path) -> None:
    """Refuse with exit code 3 where the disk cannot hold `need` bytes."""
    parent, free = free_bytes(target.parent)
    if need > free:
        problem = f"the disk of {parent} has {format_size(free)} free, and {target} needs {format_size(need)}"
        raise KitError(problem, str(parent), FREE_SOME, code=ENVIRONMENT)
