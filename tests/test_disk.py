"""A full disk is told with the path, the bytes needed and those that are free, in units that leave digits to read."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit.errors import ENVIRONMENT, KitError
from kit.merging import byte_ranges
from kit.storage.atomic_folder import check_free_space
from kit.storage.disk import describe_os_error, format_size


@pytest.mark.parametrize("number, text", [(900, "900 B"), (53_400, "53.4 kB"), (5.2e6, "5.2 MB"), (1.23e9, "1.23 GB")])
def test_sizes(number: float, text: str):
    assert format_size(number) == text


def test_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=53_000))
    with pytest.raises(KitError) as refused:
        check_free_space(4_100_000, tmp_path / "out" / "merged")
    [problem] = refused.value.problems
    assert refused.value.code == ENVIRONMENT and problem.fix and problem.where == str(tmp_path)
    assert problem.problem.endswith(f"has 53 kB free, and {tmp_path}/out/merged needs 4.1 MB")


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    problem, where, fix = describe_os_error(full, tmp_path / "adapter")
    assert f"{tmp_path}/adapter cannot be written" in problem and "free" in problem and where == str(tmp_path) and fix
    assert "df -h" in describe_os_error(full)[2]  # a pipe, or a handle that has no name

    def fallocate(*_: object) -> None:
        raise full

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with open(tmp_path / "shard", "wb") as file, pytest.raises(KitError) as refused:
        byte_ranges.reserve(file.fileno(), 7_000_000)
    assert str(tmp_path / "shard") in refused.value.problems[0].problem and "7 MB needed" in str(refused.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_every_other_error_has_a_fix(number: int):
    problem, where, fix = describe_os_error(OSError(number, os.strerror(number), "/x/y"))
    assert os.strerror(number) in problem and where == "/x/y" and fix
