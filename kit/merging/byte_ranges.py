"""Ranges of bytes from file to file, at offsets, by several threads at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kit.errors import FAILED, KitError
from kit.storage.disk import FULL, describe_os_error, format_size

NO_SHORTCUT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def reserve(fd: int, size: int) -> None:
    """Take `size` bytes of disk for a file; KitError (4) where there is no room."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in FULL:
            file = os.path.realpath(f"/proc/self/fd/{fd}")
            problem, where, fix = describe_os_error(error, file)
            raise KitError(f"{problem}, {format_size(size)} needed", where, fix, code=FAILED) from None
        os.ftruncate(fd, size)


def copy_range(fd: int, file: Path, source: int, target: int, size: int) -> int:
    """Copy `size` bytes at `source` of a file to `target` of another; gives the size."""
    left = size
    with open(file, "rb", buffering=0) as handle:
        try:
            while left:
                moved = os.copy_file_range(handle.fileno(), fd, left, source + size - left, target + size - left)
                if not moved:
                    raise KitError(f"{file} ended early", fix="fetch the file again", code=FAILED)
                left -= moved
        except OSError as error:
            if error.errno not in NO_SHORTCUT:
                raise
        buffer = memoryview(bytearray(min(left, 8 << 20)))
        while left:
            part = buffer[: min(left, len(buffer))]
            read_into(handle.fileno(), part, source + size - left, file)
            write_all(fd, part, target + size - left)
            left -= len(part)
    return size


def read_into(fd: int, view: memoryview, offset: int, file: Path) -> None:
    """Fill a buffer with the bytes at an offset; KitError (4) where the file ends early."""
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:
            raise KitError(f"{file} ended early", fix="fetch the file again", code=FAILED)
        view, offset = view[count:], offset + count


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write a buffer at an offset."""
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
