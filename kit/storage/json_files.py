"""Files replaced as a whole, and JSON objects read from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kit.errors import KitError


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a file, flushed to the disk: a reader sees the old or the new one. OSError where the disk fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as `atomic_write_text` does; what JSON does not know is written as its str()."""
    atomic_write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; KitError with the reason where it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KitError(
            f"{path} cannot be read: {error}", str(path), "check the path, or write the file again"
        ) from None
    if not isinstance(value, dict):
        raise KitError(f"{path} does not hold a JSON object", str(path), 'the file begins with "{"')
    return value


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that another process writes; {} where it is missing, damaged or no object."""
    try:
        return read_json(path)
    except KitError:
        return {}
