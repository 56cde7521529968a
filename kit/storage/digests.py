"""The SHA-256 of files, computed once: remembered under path, size, time of change and inode."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from kit.storage.json_files import atomic_write_json, read_json_or_empty
from kit.system.paths import kit_cache_folder

MEMORY = "digests.json"  # below the kit's cache folder
REMEMBERED = 5_000  # files, the latest ones
BLOB_NAME = re.compile(r"[0-9a-f]{64}")


def file_digests(files: Sequence[Path]) -> list[str]:
    """Return the sha256 of each file; of a large file in the Hub's cache it is the name of its blob."""
    known = read_json_or_empty(kit_cache_folder() / MEMORY) if files else {}
    return [_file_digest(file, known) for file in files]


def _file_digest(file: Path, known: dict[str, str]) -> str:
    real = file.resolve()
    if real.parent.name == "blobs" and BLOB_NAME.fullmatch(real.name):  # huggingface_hub: the etag of an LFS file
        return real.name
    status = file.stat()
    name = f"{file.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    memory = kit_cache_folder() / MEMORY
    if name not in known:
        with open(file, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        memory.parent.mkdir(parents=True, exist_ok=True)
        known[name] = digest
        others = dict(list(read_json_or_empty(memory).items())[-REMEMBERED:])  # other processes write it too
        atomic_write_json(memory, {**others, name: digest})
    return known[name]


def describe_files(files: list[Path]) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of each file, by its path."""
    return {
        str(file): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, file_digests(files), strict=True)
    }
