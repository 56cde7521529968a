"""A finding, and the one way in which checks run another program."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OK: Literal["ok"] = "ok"
WARN: Literal["warn"] = "warn"  # worth knowing; some runs would suffer
BAD: Literal["bad"] = "bad"  # a run would stop
PROGRAM_TIMEOUT = 5.0  # no program that a check asks may take longer


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warn", "bad"]
    what: str
    found: str
    fix: str = ""


def find_program(name: str, env: Mapping[str, str]) -> str | None:
    """A program on the PATH of `env`."""
    return shutil.which(name, path=env.get("PATH", os.defpath))


def run_program(argv: list[str], env: Mapping[str, str], seconds: float = PROGRAM_TIMEOUT) -> tuple[bool, str]:
    """Whether a program succeeded within its time, and what it printed (or why there is nothing)."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=seconds, env={**env, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"{Path(argv[0]).name} gave no answer within {seconds:.0f} s"
    except OSError as error:
        return False, f"{Path(argv[0]).name}: {error.strerror}"
    return done.returncode == 0, (done.stdout or done.stderr).strip() or (done.stderr or "").strip()


def format_gb(number: float) -> str:
    """Bytes as people read them."""
    return f"{number / 1e9:.1f} GB" if number < 1e11 else f"{number / 1e9:.0f} GB"
