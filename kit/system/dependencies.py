"""Whether the training stack is there, and in which versions: the bare install checks and plans without it."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

from kit.errors import ENVIRONMENT, KitError


def require_training_extras() -> None:
    """KitError (3) on the bare install: it checks and plans, but training and merging need the extra."""
    missing = [name for name in ("torch", "transformers", "trl", "peft", "datasets") if not is_installed(name)]
    if missing:
        raise KitError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            fix="make setup in a checkout, or pip install torch and then --no-build-isolation 'finetune-kit[train]'",
            code=ENVIRONMENT,
        )


def installed_version(package: str) -> str | None:
    """The version of an installed package, by its metadata alone."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release_numbers(version: str) -> tuple[int, ...]:
    """The release part of a version: 2.13.0+cu130 -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # an import hook may say no in its own way
        return False
